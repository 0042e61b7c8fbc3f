// SPDX-License-Identifier: Apache-2.0

package live

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
	"github.com/weirmesh/weir/test/cases/probe"
	"github.com/weirmesh/weir/test/e2e/netns"
)

// Health is the health endpoint of a node: a namespace without a name, which only the agent holds.
type Health struct {
	probe.Namespace
	Addrs []netip.Addr
	file  *os.File
}

// Close lets the namespace go.
func (h *Health) Close() { h.file.Close() }

// Health finds the health endpoint of a node.
func (l *Lab) Health(ctx context.Context, node string) (*Health, error) {
	addrs, err := l.healthAddrs(ctx, node)
	if err != nil {
		return nil, fmt.Errorf("health endpoint of %s: %w", node, err)
	}
	state, err := l.State(ctx)
	if err != nil {
		return nil, err
	}
	for _, p := range state.Parts {
		if p.Name != "agent/"+node {
			continue
		}
		fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", p.Pid))
		if err != nil {
			return nil, err
		}
		for _, fd := range fds {
			if target, err := os.Readlink(fd); err != nil || !strings.HasPrefix(target, "net:[") {
				continue
			}
			if file, err := os.Open(fd); err == nil {
				path := fmt.Sprintf("/proc/self/fd/%d", file.Fd())
				if has(path, addrs[0]) {
					return &Health{probe.Namespace{Title: "health of " + node, Path: path}, addrs, file}, nil
				}
				file.Close()
			}
		}
	}
	return nil, fmt.Errorf("health endpoint of %s: no namespace of the agent has %s", node, addrs[0])
}

func (l *Lab) healthAddrs(ctx context.Context, node string) ([]netip.Addr, error) {
	conn, err := dial("unix:///run/weir/" + l.Name + "/nodes/" + node + "/agent.sock")
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	r, err := agentv1.NewAgentServiceClient(conn).ListEndpoints(ctx, &agentv1.ListEndpointsRequest{})
	if err != nil {
		return nil, err
	}
	for _, e := range r.Endpoints {
		if e.Uid != "health" {
			continue
		}
		var addrs []netip.Addr
		for _, text := range e.Addresses {
			if a, err := netip.ParseAddr(text); err == nil {
				addrs = append(addrs, a)
			}
		}
		if len(addrs) > 0 {
			return addrs, nil
		}
	}
	return nil, errors.New("the agent has none")
}

// has reports whether a namespace has an address.
func has(path string, a netip.Addr) (found bool) {
	_ = netns.Do(path, func() error {
		addrs, err := net.InterfaceAddrs()
		found = slices.ContainsFunc(addrs, func(x net.Addr) bool {
			p, err := netip.ParsePrefix(x.String())
			return err == nil && p.Addr() == a
		})
		return err
	})
	return found
}
