// SPDX-License-Identifier: Apache-2.0

package endpoint

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"time"

	"github.com/weirmesh/weir/services/agent/internal/address"
	"github.com/weirmesh/weir/services/agent/internal/desired"
	"github.com/weirmesh/weir/services/agent/internal/netdev"
	"github.com/weirmesh/weir/services/agent/internal/statefile"
)

// Phase says how far an endpoint is.
type Phase string

// Phases, as `weir endpoint list` shows them.
const (
	// Creating: what is in the kernel may be incomplete; a restart removes it.
	Creating Phase = "creating"
	// Ready: the pod can talk.
	Ready Phase = "ready"
	// Deleting: a restart goes on with the removal.
	Deleting Phase = "disconnecting"
)

// Endpoint is a pod that is plugged into this node, as it lies on disk.
type Endpoint struct {
	ID          uint16           `json:"id"`
	ContainerID string           `json:"container"`
	IfName      string           `json:"ifname"`
	Netns       string           `json:"netns"`
	UID         string           `json:"uid"`
	Namespace   string           `json:"namespace"`
	Name        string           `json:"name"`
	Identity    uint32           `json:"identity"`
	Workload    desired.Workload `json:"workload"`
	Addresses   []netip.Addr     `json:"addresses"`
	HostIfName  string           `json:"hostIfname"`
	HostMAC     string           `json:"hostMAC"`
	MAC         string           `json:"mac"`
	MTU         int              `json:"mtu"`
	Unmanaged   bool             `json:"unmanaged,omitempty"`
	NetnsCookie uint64           `json:"netnsCookie,omitempty"`
	Created     time.Time        `json:"created"`
	Phase       Phase            `json:"phase"`

	namedPorts map[string]uint32
}

// wire describes the endpoint's veth pair.
func (e *Endpoint) wire() (netdev.Pod, error) {
	host, err := net.ParseMAC(e.HostMAC)
	if err != nil {
		return netdev.Pod{}, fmt.Errorf("host MAC: %w", err)
	}
	pod, err := net.ParseMAC(e.MAC)
	if err != nil {
		return netdev.Pod{}, fmt.Errorf("MAC: %w", err)
	}
	return netdev.Pod{HostName: e.HostIfName, PodName: e.IfName, HostMAC: host, PodMAC: pod, MTU: e.MTU, Addresses: e.Addresses}, nil
}

type stateFile struct {
	LastID    uint16                    `json:"lastID"`
	Pools     map[string]address.Memory `json:"pools"`
	Endpoints []*Endpoint               `json:"endpoints"`
}

const (
	stateKind    = "endpoints"
	stateVersion = 1
)

// ReadEndpoints reads the endpoints of the last agent; none when there is no file.
func ReadEndpoints(path string) ([]*Endpoint, error) {
	f, err := readState(path)
	return f.Endpoints, err
}

// Wire describes the endpoint's veth pair.
func (e *Endpoint) Wire() (netdev.Pod, error) { return e.wire() }

func readState(path string) (stateFile, error) {
	var f stateFile
	b, err := statefile.Read(path, stateKind, stateVersion)
	if errors.Is(err, fs.ErrNotExist) {
		return f, nil
	}
	if err != nil {
		return f, err
	}
	if err := json.Unmarshal(b, &f); err != nil {
		return f, fmt.Errorf("read %s: %w: %w", path, statefile.ErrDamaged, err)
	}
	return f, nil
}

func writeState(path string, f stateFile) error {
	b, err := json.Marshal(f)
	if err != nil {
		return err
	}
	return statefile.Write(path, stateKind, stateVersion, b)
}
