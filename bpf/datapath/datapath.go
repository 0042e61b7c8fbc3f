// SPDX-License-Identifier: Apache-2.0

// Package datapath owns Weir's eBPF programs and maps on one node: it loads and pins them, attaches them to interfaces and cgroups, and
// gives each map a typed owner. Traffic goes on while no process holds a Datapath: programs, maps and links are pinned.
//
// All methods may be called concurrently, except that Rings has one reader. Functions that name an interface look it up in the network
// namespace of the calling thread.
package datapath

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"sync"

	"github.com/cilium/ebpf"
)

// ErrIncompatible means that what is pinned was made by a version with another layout; see Remove.
var ErrIncompatible = errors.New("pinned maps have another layout")

// Datapath is a loaded datapath.
type Datapath struct {
	cfg Config
	log *slog.Logger

	// The collection holds every map and program: an object that nothing refers to is closed by the garbage collector.
	coll  *ebpf.Collection // tc programs, and all maps
	sock  *ebpf.Collection // socket hooks
	rings []*ebpf.Map

	endpoints *Endpoints
	ipcache   *IPCache
	services  *Services
	policies  *Policies
	slots     *Slots
	conntrack *Conntrack
	reader    *Rings

	mu     sync.Mutex // guards what is below, and attaching
	links  map[string]heldLink
	clsact bool // some hook is a clsact filter
	tcx    bool // some hook is a tcx link
	cgroup bool
}

// Load creates the maps under cfg.PinPath, or takes over those of an earlier process, and replaces the programs of every hook that is
// still attached by a link, each atomically. (Hooks attached by clsact filters are replaced by the next Attach call.) A pinned map of another
// layout is an error: ErrIncompatible.
func Load(cfg Config, log *slog.Logger) (*Datapath, error) {
	cfg.Timeouts.fill()
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("datapath config: %w", err)
	}
	d := &Datapath{cfg: cfg, log: log.With("component", "datapath"), links: map[string]heldLink{}}
	if err := d.load(); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

func (d *Datapath) load() error {
	if err := os.MkdirAll(d.linkDir(), 0o700); err != nil {
		return fmt.Errorf("pin folder: %w", err)
	}
	if err := d.loadCollections(); err != nil {
		return err
	}
	if err := d.openRings(); err != nil {
		return err
	}
	maps := d.coll.Maps
	d.endpoints = &Endpoints{endpoints: maps[tcMapEndpoints], interfaces: maps[tcMapInterfaces], netns: maps[tcMapNetns]}
	d.ipcache = &IPCache{m: maps[tcMapIpcache]}
	d.slots = &Slots{m: maps[tcMapSlots]}
	d.conntrack = newConntrack(maps[tcMapCt], d.coll.Programs[tcProgSweep])
	var err error
	if d.services, err = newServices(d.serviceMaps()); err != nil {
		return err
	}
	if err := d.adoptServices(); err != nil {
		return err
	}
	d.policies, err = newPolicies(maps[tcMapPolicyEndpoints], maps[tcMapPolicyPeers], maps[tcMapPolicyRanges], maps[tcMapPolicyGeneration])
	if err != nil {
		return err
	}
	if d.reader, err = newRings(d.rings, maps[tcMapFlowstate]); err != nil {
		return err
	}
	old, err := d.copyOld()
	if err == nil {
		err = d.takeOverLinks()
	}
	if err == nil {
		err = errors.Join(d.adoptRest(old), d.dropOldServices())
	}
	return errors.Join(err, old.close())
}

func (d *Datapath) serviceMaps() serviceMaps {
	maps := d.coll.Maps
	return serviceMaps{
		services: maps[tcMapServices], backends: maps[tcMapBackends], members: maps[tcMapMembers], ranges: maps[tcMapSourceRanges],
		maglev: maps[tcMapMaglev], connections: maps[tcMapLb], nat: maps[tcMapNat], host: maps[tcMapLbHost],
		maglevSize: d.cfg.MaglevTableSize, node: []netip.Addr{d.cfg.NodeIPv4.Unmap(), d.cfg.NodeIPv6},
	}
}

// Close lets go of maps and programs; what is pinned or attached stays. Nobody may use the Datapath any more, Rings above all: their memory
// is unmapped.
func (d *Datapath) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	var errs []error
	if d.reader != nil {
		errs = append(errs, d.reader.close())
	}
	for name, l := range d.links {
		errs = append(errs, l.link.Close())
		delete(d.links, name)
	}
	for _, m := range d.rings {
		errs = append(errs, m.Close())
	}
	d.rings = nil
	for _, c := range []*ebpf.Collection{d.coll, d.sock} {
		if c != nil {
			c.Close()
		}
	}
	return errors.Join(errs...)
}

// Path names, in words for a person, the kernel features in use.
func (d *Datapath) Path() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	var words []string
	if d.tcx {
		words = append(words, "tcx")
	}
	if d.clsact {
		words = append(words, "clsact")
	}
	words = append(words, "redirect_peer", "ring buffer per cpu")
	if d.cgroup {
		words = append(words, "socket translation")
	}
	if d.cfg.Routing == RoutingVXLAN {
		words = append(words, "vxlan")
	}
	if d.cfg.Masquerade {
		words = append(words, "bpf masquerade")
	}
	return words
}

// Endpoints owns the map of local endpoints.
func (d *Datapath) Endpoints() *Endpoints { return d.endpoints }

// IPCache owns the map of identities.
func (d *Datapath) IPCache() *IPCache { return d.ipcache }

// Services owns the maps of services and backends.
func (d *Datapath) Services() *Services { return d.services }

// Policies owns the maps of policy.
func (d *Datapath) Policies() *Policies { return d.policies }

// Slots owns the map of the proxy's listeners.
func (d *Datapath) Slots() *Slots { return d.slots }

// Conntrack reads and sweeps the connection table.
func (d *Datapath) Conntrack() *Conntrack { return d.conntrack }

// Rings reads the records.
func (d *Datapath) Rings() *Rings { return d.reader }
