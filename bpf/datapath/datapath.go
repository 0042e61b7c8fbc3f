// SPDX-License-Identifier: Apache-2.0

// Package datapath owns Weir's eBPF programs and maps on one node: it loads and pins them, attaches them to interfaces and cgroups, and
// gives each map a typed owner. Traffic goes on while no process holds a Datapath: programs, maps and links are pinned.
//
// All methods may be called concurrently, except that Rings and Conntrack.Sweep have one caller each. Functions that name an
// interface look it up in the network namespace of the calling thread.
package datapath

import (
	"errors"
	"log/slog"
)

// Datapath is a loaded datapath.
type Datapath struct {
	cfg Config
	log *slog.Logger
}

// Load creates the maps under cfg.PinPath, or takes over those of an earlier process, and replaces the programs of every hook that is
// still attached, each atomically. A pinned map of another layout is an error: ErrIncompatible.
func Load(cfg Config, log *slog.Logger) (*Datapath, error) {
	return nil, errors.ErrUnsupported
}

// ErrIncompatible means that what is pinned was made by a version with another layout; see Remove.
var ErrIncompatible = errors.New("pinned maps have another layout")

// Remove detaches and unpins everything under a pin path, including clsact filters in the calling thread's network namespace. Nothing
// there is not an error.
func Remove(pinPath string) error { return errors.ErrUnsupported }

// Close lets go of maps and programs; what is pinned or attached stays.
func (d *Datapath) Close() error { return errors.ErrUnsupported }

// AttachPod attaches the programs of a pod's host-side interface. Idempotent.
func (d *Datapath) AttachPod(ifname string) error { return errors.ErrUnsupported }

// DetachPod undoes AttachPod. It succeeds when the interface is gone already.
func (d *Datapath) DetachPod(ifname string) error { return errors.ErrUnsupported }

// AttachUplink attaches the programs of the interface to the other nodes. Idempotent.
func (d *Datapath) AttachUplink(ifname string) error { return errors.ErrUnsupported }

// AttachHost attaches the program that delivers what the node's own stack sends to pods, at the receiving end of the node's veth pair
// (weir_net). Idempotent.
func (d *Datapath) AttachHost(ifname string) error { return errors.ErrUnsupported }

// AttachCgroup attaches the socket hooks to a cgroup v2 folder; they follow every process below it. Idempotent.
func (d *Datapath) AttachCgroup(path string) error { return errors.ErrUnsupported }

// Path names, in words for a person, the kernel features in use: "tcx", "redirect_peer", "ring buffer per cpu", ...
func (d *Datapath) Path() []string { return nil }

// Endpoints owns the map of local endpoints.
func (d *Datapath) Endpoints() *Endpoints { return nil }

// IPCache owns the map of identities.
func (d *Datapath) IPCache() *IPCache { return nil }

// Services owns the maps of services and backends.
func (d *Datapath) Services() *Services { return nil }

// Conntrack reads the connection table.
func (d *Datapath) Conntrack() *Conntrack { return nil }

// Rings reads the records.
func (d *Datapath) Rings() *Rings { return nil }

// Counters reads what the programs count.
func (d *Datapath) Counters() (Counters, error) { return Counters{}, errors.ErrUnsupported }

// Drops reads the rows of dropped traffic.
func (d *Datapath) Drops() ([]DropRow, error) { return nil, errors.ErrUnsupported }
