// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
)

// A connection goes on while the datapath is closed, and while a new process loads it; its totals go on too, and no packet is missing in them.
func TestReload(t *testing.T) {
	w := newWorld(t, nil)
	a := w.plug("a", epA, idA, podA4, podA6)
	b := w.plug("b", epB, idB, podB4, podB6)
	echoServer(w, b, at(podB4, 8080))
	var c net.Conn
	w.do(inside(a.ns, func() (err error) {
		c, err = net.DialTimeout("tcp", at(podB4, 8080).String(), 5*time.Second)
		return err
	}))
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	const line = "over and over again"
	exchange := func() {
		t.Helper()
		if _, err := c.Write([]byte(line)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, make([]byte, len(line))); err != nil {
			t.Fatal(err)
		}
	}
	exchange()
	w.do(w.Close())
	exchange() // nobody holds the datapath
	w.Datapath = load(t, w.cfg)
	if got := len(w.links); got != 7 {
		t.Errorf("%d links were taken over, want 7: two each of both pods and the uplink, one of the host", got)
	}
	exchange()
	var found []Conn
	w.do(w.Conntrack().List(func(c Conn) bool { found = append(found, c); return true }))
	if len(found) != 2 {
		t.Fatalf("%d entries, want 2", len(found))
	}
	for _, conn := range found {
		// At least SYN, ACK and three segments; exactly three times the data beside headers of 52 bytes, SYN 60.
		data := conn.Forward.Bytes - 52*(conn.Forward.Packets-1) - 60
		if data != 3*uint64(len(line)) {
			t.Errorf("endpoint %d: %+v carries %d bytes, want %d", conn.Endpoint, conn.Forward, data, 3*len(line))
		}
	}
	// Attaching again changes nothing.
	w.do(w.AttachPod(a.host), w.AttachPod(b.host), w.AttachUplink("eth0"), w.AttachHost("weir_net"))
	exchange()
}

// Programs attached by clsact do the same work; going from one way to the other works under traffic.
func TestClsact(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.ForceClsact = true })
	a := w.plug("a", epA, idA, podA4, podA6)
	b := w.plug("b", epB, idB, podB4, podB6)
	if !slices.Contains(w.Path(), "clsact") || slices.Contains(w.Path(), "tcx") {
		t.Errorf("path %v, want clsact", w.Path())
	}
	echoServer(w, b, at(podB4, 8080))
	try := func(name string, filters int) {
		t.Helper()
		w.records()
		exchange(w, a, at(podB4, 8080), "hello")
		starts := 0
		for _, r := range w.records() {
			if r.Type == RecordTrace && r.TcpFlags == syn {
				starts++
			}
		}
		if starts != 2 {
			t.Errorf("%s: %d SYN records, want one at each end", name, starts)
		}
		if n := countFilters(w, a.host); n != filters {
			t.Errorf("%s: %d filters, want %d", name, n, filters)
		}
	}
	attach := func() {
		w.do(w.AttachPod(a.host), w.AttachPod(b.host), w.AttachUplink("eth0"), w.AttachHost("weir_net"))
	}
	try("clsact", 2)
	attach()
	try("clsact again", 2)
	restart := func(force bool) {
		w.do(w.Close())
		w.cfg.ForceClsact = force
		w.Datapath = load(t, w.cfg)
		attach()
	}
	restart(false)
	try("tcx after clsact", 0)
	restart(true)
	try("clsact after tcx", 2)
	w.do(w.DetachPod(a.host))
	if n := countFilters(w, a.host); n != 0 {
		t.Errorf("%d filters after detaching, want none", n)
	}
}

func countFilters(w *world, ifname string) (n int) {
	w.Helper()
	l, err := netlink.LinkByName(ifname)
	w.do(err)
	for _, ingress := range []bool{true, false} {
		filters, err := netlink.FilterList(l, clsactParent(ingress))
		w.do(err)
		n += len(filters)
	}
	return n
}

// Detaching takes the programs away, also when the interface is gone, and another interface of its name gets them anew.
func TestDetach(t *testing.T) {
	w := newWorld(t, nil)
	a := w.plug("a", epA, idA, podA4, podA6)
	pins := func() (n int) {
		entries, err := os.ReadDir(w.linkDir())
		w.do(err)
		for _, e := range entries {
			if strings.HasSuffix(e.Name(), "@"+a.host) {
				n++
			}
		}
		return n
	}
	if pins() != 2 {
		t.Fatalf("%d pinned links, want 2", pins())
	}
	w.do(w.DetachPod(a.host))
	if pins() != 0 {
		t.Errorf("%d pinned links after detaching, want none", pins())
	}
	w.do(w.DetachPod(a.host), w.DetachPod("nosuchif"))
	w.do(w.AttachPod(a.host))
	l, err := netlink.LinkByName(a.host)
	w.do(err, netlink.LinkDel(l), addPair(a.host, "other"), w.AttachPod(a.host))
	if pins() != 2 {
		t.Errorf("%d pinned links of the new interface, want 2", pins())
	}
	l, err = netlink.LinkByName(a.host)
	w.do(err, netlink.LinkDel(l), w.DetachPod(a.host))
	if pins() != 0 {
		t.Errorf("%d pinned links of a gone interface, want none", pins())
	}
	if err := w.AttachPod(a.host); err == nil {
		t.Error("attached to an interface that is gone")
	}
	// A process that comes later forgets links without a target.
	w.do(addPair(a.host, "other"), w.AttachPod(a.host))
	l, err = netlink.LinkByName(a.host)
	w.do(err, w.Close(), netlink.LinkDel(l))
	w.Datapath = load(t, w.cfg)
	if pins() != 0 {
		t.Errorf("%d pinned links of a gone interface after a restart, want none", pins())
	}
}

// A map of another layout is refused with a clear error; other sizes are kept.
func TestIncompatiblePins(t *testing.T) {
	pin := bpffs(t)
	inNetns(t)
	cfg := smallConfig(pin)
	d := load(t, cfg)
	bigger := cfg
	bigger.ConntrackMax *= 2
	bigger.RingBytes *= 2
	d2 := load(t, bigger)
	if got := d2.Conntrack().Max(); got != cfg.ConntrackMax {
		t.Errorf("ct of %d entries, want the pinned %d", got, cfg.ConntrackMax)
	}
	if got := d2.Rings().Bytes(); got != d.Rings().Bytes() {
		t.Errorf("rings of %d bytes, want the pinned %d", got, d.Rings().Bytes())
	}
	name := filepath.Join(pin, pinName(tcMapEndpoints))
	if err := os.Remove(name); err != nil {
		t.Fatal(err)
	}
	other, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Hash, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := other.Pin(name); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(cfg, slog.New(slog.DiscardHandler)); !errors.Is(err, ErrIncompatible) || !strings.Contains(err.Error(), "endpoints") {
		t.Errorf("load with a foreign map: %v, want ErrIncompatible naming it", err)
	}
	if err := Remove(pin); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(pin); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("pins after Remove: %v", err)
	}
	if err := Remove(pin); err != nil {
		t.Errorf("Remove of nothing: %v", err)
	}
	load(t, cfg)
}

// Remove detaches what another process holds.
func TestRemoveDetaches(t *testing.T) {
	dir := ownCgroup(t)
	for _, force := range []bool{false, true} {
		t.Run(fmt.Sprintf("clsact %v", force), func(t *testing.T) {
			w := newWorld(t, func(c *Config) { c.ForceClsact = force })
			w.do(w.AttachCgroup(dir))
			a := w.plug("a", epA, idA, podA4, podA6)
			w.do(Remove(w.cfg.PinPath))
			w.records()
			inside(a.ns, func() error {
				c, err := net.DialTimeout("udp", at(podB4, 53).String(), time.Second)
				w.do(err)
				defer c.Close()
				_, err = c.Write([]byte("x"))
				return err
			})
			if r := w.records(); len(r) != 0 {
				t.Errorf("%d records after Remove, want none", len(r))
			}
		})
	}
}
