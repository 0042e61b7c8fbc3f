// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// hook is a tc program and the side of an interface where it runs.
type hook struct {
	program string
	ingress bool
}

var (
	podHooks     = []hook{{tcProgFromPod, true}, {tcProgToPod, false}}
	uplinkHooks  = []hook{{tcProgFromNetwork, true}, {tcProgToNetwork, false}}
	hostHooks    = []hook{{tcProgFromHost, true}}
	overlayHooks = []hook{{tcProgFromOverlay, true}, {tcProgToOverlay, false}}
)

// heldLink is an attached, pinned link.
type heldLink struct {
	link   link.Link
	target uint64 // ifindex, or cgroup id
}

// AttachPod attaches the programs of a pod's host-side interface. Idempotent.
func (d *Datapath) AttachPod(ifname string) error { return d.attach(ifname, podHooks) }

// AttachUplink attaches the programs of the interface to the other nodes. Idempotent.
func (d *Datapath) AttachUplink(ifname string) error { return d.attach(ifname, uplinkHooks) }

// AttachHost attaches the program that delivers what the node's own stack sends to pods, at the receiving end of the node's veth pair
// (weir_net). Idempotent.
func (d *Datapath) AttachHost(ifname string) error { return d.attach(ifname, hostHooks) }

// AttachOverlay attaches the programs of the VXLAN device: Config.OverlayIfIndex must be its number. Idempotent.
func (d *Datapath) AttachOverlay(ifname string) error {
	iface, err := net.InterfaceByName(ifname)
	if err != nil {
		return fmt.Errorf("attach %s: %w", ifname, err)
	}
	if d.cfg.Routing != RoutingVXLAN || uint32(iface.Index) != d.cfg.OverlayIfIndex {
		return fmt.Errorf("attach %s: the programs are loaded for routing %v by interface %d", ifname, d.cfg.Routing, d.cfg.OverlayIfIndex)
	}
	return d.attach(ifname, overlayHooks)
}

// DetachPod undoes AttachPod. It succeeds when the interface is gone already.
func (d *Datapath) DetachPod(ifname string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	var errs []error
	for _, h := range podHooks {
		errs = append(errs, d.dropLink(linkName(h.program, ifname)))
	}
	errs = append(errs, removeFilters(filterPrefix(d.cfg.PinPath), ifname))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("detach %s: %w", ifname, err)
	}
	return nil
}

func (d *Datapath) attach(ifname string, hooks []hook) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	iface, err := net.InterfaceByName(ifname)
	if err != nil {
		return fmt.Errorf("attach %s: %w", ifname, err)
	}
	for _, h := range hooks {
		if err := d.attachHook(iface, h); err != nil {
			return fmt.Errorf("attach %s to %s: %w", h.program, ifname, err)
		}
	}
	return nil
}

// cgroupHooks are the socket hooks.
var cgroupHooks = []struct {
	program string
	at      ebpf.AttachType
}{
	{sockProgConnect4, ebpf.AttachCGroupInet4Connect},
	{sockProgConnect6, ebpf.AttachCGroupInet6Connect},
	{sockProgSendmsg4, ebpf.AttachCGroupUDP4Sendmsg},
	{sockProgSendmsg6, ebpf.AttachCGroupUDP6Sendmsg},
	{sockProgRecvmsg4, ebpf.AttachCGroupUDP4Recvmsg},
	{sockProgRecvmsg6, ebpf.AttachCGroupUDP6Recvmsg},
	{sockProgGetpeername4, ebpf.AttachCgroupInet4GetPeername},
	{sockProgGetpeername6, ebpf.AttachCgroupInet6GetPeername},
	{sockProgSockOps, ebpf.AttachCGroupSockOps},
}

// AttachCgroup attaches the socket hooks to a cgroup v2 folder; they follow every process below it. Idempotent.
func (d *Datapath) AttachCgroup(path string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return fmt.Errorf("attach cgroup %s: %w", path, err)
	}
	for _, h := range cgroupHooks {
		// The inode of a cgroup is its id.
		name := linkName(h.program, fmt.Sprintf("cgroup-%d", st.Ino))
		if _, ok := d.links[name]; ok {
			continue
		}
		l, err := link.AttachCgroup(link.CgroupOptions{Path: path, Attach: h.at, Program: d.sock.Programs[h.program]})
		if err != nil {
			return fmt.Errorf("attach %s to cgroup %s: %w", h.program, path, err)
		}
		if err := d.hold(name, l, st.Ino); err != nil {
			return fmt.Errorf("attach %s to cgroup %s: %w", h.program, path, err)
		}
	}
	d.cgroup = true
	return nil
}

// program finds a program of either collection, or nil.
func (d *Datapath) program(name string) *ebpf.Program {
	if p := d.coll.Programs[name]; p != nil {
		return p
	}
	return d.sock.Programs[name]
}

// attachHook attaches by tcx where there is tcx. While a hook changes from one way to the other both are attached; tcx comes first
// and its verdict ends the matter, so that no packet is seen twice.
func (d *Datapath) attachHook(iface *net.Interface, h hook) error {
	prog := d.coll.Programs[h.program]
	name := linkName(h.program, iface.Name)
	if !d.cfg.ForceClsact {
		err := d.attachTCX(name, iface.Index, prog, h.ingress)
		if err == nil {
			d.tcx = true
			return removeFilter(filterPrefix(d.cfg.PinPath), iface.Index, h.ingress)
		}
		if !errors.Is(err, ebpf.ErrNotSupported) {
			return err
		}
	}
	if err := replaceFilter(filterPrefix(d.cfg.PinPath)+h.program, iface.Index, prog, h.ingress); err != nil {
		return err
	}
	d.clsact = true
	return d.dropLink(name)
}

func (d *Datapath) attachTCX(name string, ifindex int, prog *ebpf.Program, ingress bool) error {
	if held, ok := d.links[name]; ok {
		if now, err := linkTarget(held.link); err == nil && now == uint64(ifindex) {
			return nil
		}
		// The interface was replaced by another of its name.
		if err := d.dropLink(name); err != nil {
			return err
		}
	}
	at := ebpf.AttachTCXEgress
	if ingress {
		at = ebpf.AttachTCXIngress
	}
	l, err := link.AttachTCX(link.TCXOptions{Interface: ifindex, Program: prog, Attach: at})
	if err != nil {
		return err
	}
	return d.hold(name, l, uint64(ifindex))
}

// hold pins a new link and keeps it.
func (d *Datapath) hold(name string, l link.Link, target uint64) error {
	pin := filepath.Join(d.linkDir(), name)
	if err := os.Remove(pin); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return errors.Join(err, l.Close())
	}
	if err := l.Pin(pin); err != nil {
		return errors.Join(fmt.Errorf("pin: %w", err), l.Close())
	}
	d.links[name] = heldLink{link: l, target: target}
	return nil
}

// dropLink detaches and unpins; no such link is not an error.
func (d *Datapath) dropLink(name string) error {
	pin := filepath.Join(d.linkDir(), name)
	if held, ok := d.links[name]; ok {
		delete(d.links, name)
		err := os.Remove(pin)
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		return errors.Join(err, held.link.Close())
	}
	if err := os.Remove(pin); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// takeOverLinks gives every pinned link the new program. A link whose interface or cgroup is gone is forgotten.
func (d *Datapath) takeOverLinks() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	entries, err := os.ReadDir(d.linkDir())
	if err != nil {
		return fmt.Errorf("pinned links: %w", err)
	}
	for _, e := range entries {
		pin := filepath.Join(d.linkDir(), e.Name())
		program, _, ok := strings.Cut(e.Name(), "@")
		prog := d.program(program)
		if !ok || prog == nil {
			d.log.Warn("pinned link of an unknown program is removed", "pin", pin)
			if err := os.Remove(pin); err != nil {
				return fmt.Errorf("pinned link: %w", err)
			}
			continue
		}
		l, err := link.LoadPinnedLink(pin, nil)
		if err != nil {
			return fmt.Errorf("pinned link %s: %w", e.Name(), err)
		}
		target, err := linkTarget(l)
		if err == nil && target != 0 {
			err = l.Update(prog)
		}
		if err != nil || target == 0 {
			d.log.Info("pinned link has lost its target", "link", e.Name(), "error", err)
			if err := errors.Join(os.Remove(pin), l.Close()); err != nil {
				return fmt.Errorf("pinned link %s: %w", e.Name(), err)
			}
			continue
		}
		d.links[e.Name()] = heldLink{link: l, target: target}
		d.noteLink(l)
	}
	return nil
}

func (d *Datapath) noteLink(l link.Link) {
	info, err := l.Info()
	if err != nil {
		return
	}
	if info.TCX() != nil {
		d.tcx = true
	} else {
		d.cgroup = true
	}
}

// linkTarget returns the ifindex or cgroup of a link; 0 means that it is gone.
func linkTarget(l link.Link) (uint64, error) {
	info, err := l.Info()
	if err != nil {
		return 0, fmt.Errorf("link info: %w", err)
	}
	if t := info.TCX(); t != nil {
		return uint64(t.Ifindex), nil
	}
	if c := info.Cgroup(); c != nil {
		return c.CgroupId, nil
	}
	return 0, fmt.Errorf("link of type %v: unexpected", info.Type)
}

// linkName is a pin's name; the bpf file system takes no dots.
func linkName(program, target string) string {
	return program + "@" + strings.ReplaceAll(target, ".", ":")
}

// filterPrefix marks the clsact filters of one pin path.
func filterPrefix(pinPath string) string {
	h := fnv.New32a()
	h.Write([]byte(filepath.Clean(pinPath)))
	return fmt.Sprintf("weir-%08x-", h.Sum32())
}

// Remove detaches and unpins everything under a pin path, including clsact filters in the calling thread's network namespace. Nothing
// there is not an error.
func Remove(pinPath string) error {
	var errs []error
	dir := filepath.Join(pinPath, "links")
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, err)
	}
	for _, e := range entries {
		l, err := link.LoadPinnedLink(filepath.Join(dir, e.Name()), nil)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		// Detach as well: another process may hold the link. A link without a target cannot be detached.
		if err := l.Detach(); err != nil && !errors.Is(err, ebpf.ErrNotSupported) {
			if target, terr := linkTarget(l); terr == nil && target != 0 {
				errs = append(errs, fmt.Errorf("detach %s: %w", e.Name(), err))
			}
		}
		errs = append(errs, l.Close())
	}
	errs = append(errs, removeFilters(filterPrefix(pinPath), ""), os.RemoveAll(pinPath))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove %s: %w", pinPath, err)
	}
	return nil
}
