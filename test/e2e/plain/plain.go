// SPDX-License-Identifier: Apache-2.0

// Package plain builds the benchmarks' baseline: the lab's shape (two nodes on a bridge, two pods on the first and one on
// the second) joined by the kernel's routing alone, with no eBPF.
package plain

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// Network is the baseline. Close removes it.
type Network struct {
	prefix string
	names  []string
	procs  []*exec.Cmd
}

// Pods and their addresses.
var Pods = map[string]string{"a": "10.245.1.1", "b": "10.245.1.2", "c": "10.245.2.1"}

// New builds the network in namespaces that begin with prefix.
func New(prefix string) (n *Network, err error) {
	n = &Network{prefix: prefix}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.Close())
		}
	}()
	for _, name := range []string{"fabric", "node1", "node2", "a", "b", "c"} {
		if err := n.namespace(name); err != nil {
			return n, err
		}
	}
	err = n.in("fabric", func() error {
		br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}
		return errors.Join(netlink.LinkAdd(br), netlink.LinkSetUp(br))
	})
	if err != nil {
		return n, fmt.Errorf("bridge: %w", err)
	}
	for i, node := range []string{"node1", "node2"} {
		if err := n.veth(node, "eth0", "fabric", node, fmt.Sprintf("172.31.0.%d/24", i+1)); err != nil {
			return n, err
		}
		err := n.in("fabric", func() error {
			port, err := netlink.LinkByName(node)
			if err != nil {
				return err
			}
			br, err := netlink.LinkByName("br0")
			if err != nil {
				return err
			}
			return errors.Join(netlink.LinkSetMaster(port, br), netlink.LinkSetUp(port))
		})
		if err != nil {
			return n, fmt.Errorf("join %s: %w", node, err)
		}
		err = n.in(node, func() error {
			lo, err := netlink.LinkByName("lo")
			if err != nil {
				return err
			}
			gateway, err := netlink.ParseAddr("169.254.1.1/32") // the pods' gateway, answered by ARP on every interface
			if err != nil {
				return err
			}
			return errors.Join(netlink.AddrAdd(lo, gateway), os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0), route(fmt.Sprintf("10.245.%d.0/24", 2-i), fmt.Sprintf("172.31.0.%d", 2-i), "eth0"))
		})
		if err != nil {
			return n, fmt.Errorf("routes of %s: %w", node, err)
		}
	}
	for pod, node := range map[string]string{"a": "node1", "b": "node1", "c": "node2"} {
		if err := n.veth(pod, "eth0", node, "v"+pod, Pods[pod]+"/32"); err != nil {
			return n, err
		}
		err := n.in(node, func() error {
			l, err := netlink.LinkByName("v" + pod)
			if err != nil {
				return err
			}
			return errors.Join(netlink.LinkSetUp(l), route(Pods[pod]+"/32", "", "v"+pod))
		})
		if err != nil {
			return n, fmt.Errorf("plug %s: %w", pod, err)
		}
		err = n.in(pod, func() error {
			return errors.Join(route("169.254.1.1/32", "", "eth0"), route("0.0.0.0/0", "169.254.1.1", "eth0"))
		})
		if err != nil {
			return n, fmt.Errorf("routes of %s: %w", pod, err)
		}
	}
	return n, nil
}

func (n *Network) namespace(name string) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	own, err := netns.Get()
	if err != nil {
		return fmt.Errorf("own namespace: %w", err)
	}
	defer own.Close()
	made, err := netns.NewNamed(n.prefix + name)
	if err != nil {
		return fmt.Errorf("namespace %s: %w", name, err)
	}
	n.names = append(n.names, name)
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	return errors.Join(err, made.Close(), netns.Set(own))
}

// in runs fn inside a namespace of the network.
func (n *Network) in(name string, fn func() error) error {
	errc := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread dies with its foreign namespace
		h, err := netns.GetFromName(n.prefix + name)
		if err != nil {
			errc <- err
			return
		}
		defer h.Close()
		if err := netns.Set(h); err != nil {
			errc <- err
			return
		}
		errc <- fn()
	}()
	return <-errc
}

// veth makes a pair: ifname with addr in one namespace, peer in the other.
func (n *Network) veth(ns, ifname, peerNS, peer, addr string) error {
	h, err := netns.GetFromName(n.prefix + peerNS)
	if err != nil {
		return err
	}
	defer h.Close()
	return n.in(ns, func() error {
		v := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: ifname}, PeerName: peer, PeerNamespace: netlink.NsFd(h)}
		if err := netlink.LinkAdd(v); err != nil {
			return fmt.Errorf("veth %s/%s: %w", ns, ifname, err)
		}
		a, err := netlink.ParseAddr(addr)
		if err != nil {
			return err
		}
		return errors.Join(netlink.AddrAdd(v, a), netlink.LinkSetUp(v))
	})
}

func route(dst, via, dev string) error {
	l, err := netlink.LinkByName(dev)
	if err != nil {
		return err
	}
	_, cidr, err := net.ParseCIDR(dst)
	if err != nil {
		return err
	}
	r := &netlink.Route{LinkIndex: l.Attrs().Index, Dst: cidr, Scope: netlink.SCOPE_LINK}
	if via != "" {
		r.Gw, r.Scope = net.ParseIP(via), netlink.SCOPE_UNIVERSE
	}
	if err := netlink.RouteReplace(r); err != nil {
		return fmt.Errorf("route %s: %w", dst, err)
	}
	return nil
}

// Start runs a command in a pod until Close.
func (n *Network) Start(pod string, args ...string) error {
	return n.in(pod, func() error {
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Stderr = os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: 0}
		if err := cmd.Start(); err != nil {
			return fmt.Errorf("start %s: %w", args[0], err)
		}
		n.procs = append(n.procs, cmd)
		return nil
	})
}

// Exec runs a command in a pod and returns its standard output.
func (n *Network) Exec(ctx context.Context, pod string, args ...string) (string, error) {
	var out []byte
	err := n.in(pod, func() error {
		cmd := exec.CommandContext(ctx, args[0], args[1:]...)
		cmd.Stderr = os.Stderr
		var err error
		out, err = cmd.Output()
		return err
	})
	if err != nil {
		return "", fmt.Errorf("exec in plain pod %s: %s: %w", pod, strings.Join(args, " "), err)
	}
	return string(out), nil
}

// Close ends the processes and removes the namespaces.
func (n *Network) Close() error {
	var errs []error
	for _, p := range n.procs {
		_ = p.Process.Kill()
		_ = p.Wait()
	}
	for _, name := range n.names {
		if err := netns.DeleteNamed(n.prefix + name); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, fmt.Errorf("remove %s: %w", filepath.Join("/run/netns", n.prefix+name), err))
		}
	}
	return errors.Join(errs...)
}
