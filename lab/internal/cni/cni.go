// SPDX-License-Identifier: Apache-2.0

// Package cni calls a CNI plugin as a container runtime does: by exec, with the specification's environment and JSON (version 1.1.0).
package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/lab/internal/launch"
)

const version = "1.1.0"

// IfName is the name of the interface that a pod gets.
const IfName = "eth0"

// Plugin is the plugin as one node uses it.
type Plugin struct {
	// Self is the path of weir-lab.
	Self string
	// Path is the plugin's program.
	Path string
	// Netns is the node's network namespace, Cgroup the control group for the plugin's process (empty = the caller's).
	Netns, Cgroup string
	// Socket is the agent's, handed to the plugin in its configuration.
	Socket string
}

// Pod is what is plugged in.
type Pod struct {
	ContainerID          string
	Netns                string
	Namespace, Name, UID string
}

// Error is what the plugin said, by the specification's code.
type Error struct {
	Code    uint   `json:"code"`
	Msg     string `json:"msg"`
	Details string `json:"details"`
}

// Error is the plugin's message.
func (e *Error) Error() string {
	text := fmt.Sprintf("cni error %d: %s", e.Code, e.Msg)
	if e.Details != "" {
		text += "; " + e.Details
	}
	return text
}

type result struct {
	IPs []struct {
		Address string `json:"address"`
	} `json:"ips"`
}

// Add plugs a pod in and returns its addresses, as many as the plugin gave.
func (p Plugin) Add(ctx context.Context, pod Pod) ([]netip.Addr, error) {
	output, err := p.call(ctx, "ADD", pod)
	if err != nil {
		return nil, err
	}
	addresses, err := ParseResult(output)
	if err != nil {
		return nil, fmt.Errorf("cni ADD: %w", err)
	}
	return addresses, nil
}

// ParseResult reads the addresses of an ADD's answer.
func ParseResult(data []byte) ([]netip.Addr, error) {
	var r result
	if err := json.Unmarshal(data, &r); err != nil {
		return nil, fmt.Errorf("answer is not JSON: %w", err)
	}
	var addresses []netip.Addr
	for i, ip := range r.IPs {
		prefix, err := netip.ParsePrefix(ip.Address)
		if err != nil {
			return nil, fmt.Errorf("answer: ips[%d].address: %w", i, err)
		}
		addresses = append(addresses, prefix.Addr())
	}
	if len(addresses) == 0 {
		return nil, fmt.Errorf("answer has no address: %.200s", data)
	}
	return addresses, nil
}

// Delete unplugs a pod; one that was never plugged in is no error.
func (p Plugin) Delete(ctx context.Context, pod Pod) error {
	_, err := p.call(ctx, "DEL", pod)
	return err
}

// call runs the plugin once.
func (p Plugin) call(ctx context.Context, command string, pod Pod) ([]byte, error) {
	config, err := json.Marshal(map[string]string{
		"cniVersion": version, "name": "weir", "type": filepath.Base(p.Path), "socket": p.Socket,
	})
	if err != nil {
		return nil, fmt.Errorf("cni %s: %w", command, err)
	}
	process, release, err := launch.Command(p.Self, launch.Spec{
		Netns:  p.Netns,
		Cgroup: p.Cgroup,
		Args:   []string{p.Path},
		Env: []string{
			"PATH=" + os.Getenv("PATH"),
			"CNI_COMMAND=" + command,
			"CNI_CONTAINERID=" + pod.ContainerID,
			"CNI_NETNS=" + pod.Netns,
			"CNI_IFNAME=" + IfName,
			"CNI_PATH=" + filepath.Dir(p.Path),
			fmt.Sprintf("CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=%s;K8S_POD_NAME=%s;K8S_POD_INFRA_CONTAINER_ID=%s;K8S_POD_UID=%s",
				pod.Namespace, pod.Name, pod.ContainerID, pod.UID),
		},
	})
	if err != nil {
		return nil, fmt.Errorf("cni %s: %w", command, err)
	}
	defer release()
	var stdout, stderr bytes.Buffer
	process.Stdin = bytes.NewReader(config)
	process.Stdout, process.Stderr = &stdout, &stderr
	process.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	process.WaitDelay = time.Second
	if err := process.Start(); err != nil {
		return nil, fmt.Errorf("cni %s: %w", command, err)
	}
	ended := context.AfterFunc(ctx, func() { _ = process.Process.Kill() })
	defer ended()
	if err := process.Wait(); err != nil {
		if said := new(Error); json.Unmarshal(stdout.Bytes(), said) == nil && said.Msg != "" {
			return nil, said
		}
		return nil, fmt.Errorf("cni %s: %w: %.500s", command, err, bytes.TrimSpace(stderr.Bytes()))
	}
	return stdout.Bytes(), nil
}
