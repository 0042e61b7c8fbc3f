// SPDX-License-Identifier: Apache-2.0

package mirror

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/bpf/datapath"
)

// rank orders claims of one prefix: what is in the cluster is no prefix of a policy, and what is really here beats what is said of it.
type rank uint8

const (
	rankPrefix   rank = iota // a prefix that policies name
	rankService              // a service's address
	rankNode                 // a node's addresses, its pod CIDRs
	rankPeer                 // what policies say of a node's address
	rankEndpoint             // a pod
	rankLocal                // a pod of this node
)

// claim is one owner's word on a prefix.
type claim struct {
	owner string
	rank  rank
	entry datapath.IPCacheEntry
}

// claims is the desired ipcache. Of several claims the one of the highest rank counts. An address may have two owners for a moment (a new pod has a
// fixed address before the old one's removal arrives): then the one that came last counts, and when it goes, the other one counts again.
type claims struct {
	rows    map[netip.Prefix][]claim
	dirty   map[netip.Prefix]struct{}
	changed bool // a row that was there before was written, or one is gone
	written map[netip.Prefix]datapath.IPCacheEntry
	// max bounds the rows; 0 = the map does. unplaced are the prefixes without room, still dirty.
	max      int
	unplaced map[netip.Prefix]error
}

// forPods is the part of ipcache, in percent, that prefixes of policies leave to pods and nodes.
const forPods = 10

// room says why a new row has no place. What policies name outside of the cluster is refused first: it can be refused by name, a pod cannot be made to
// look like nobody.
func (c *claims) room(k rank) error {
	limit := c.max
	if k == rankPrefix {
		limit -= c.max * forPods / 100
	}
	if c.max == 0 || len(c.written) < limit {
		return nil
	}
	return fmt.Errorf("ipcache is full: %d of %d prefixes: %w", len(c.written), c.max, datapath.ErrFull)
}

func newClaims() claims {
	return claims{rows: map[netip.Prefix][]claim{}, dirty: map[netip.Prefix]struct{}{},
		written: map[netip.Prefix]datapath.IPCacheEntry{}, unplaced: map[netip.Prefix]error{}}
}

// adopt takes over what an earlier agent wrote. It may be younger than the state on disk: until keep is called, claims do not replace it.
func (c *claims) adopt(rows []datapath.IPCacheRow) {
	for _, r := range rows {
		c.written[r.Prefix] = r.IPCacheEntry
	}
}

// keep leaves adopted rows as they are, whatever is claimed so far, until settle or another claim.
func (c *claims) keep() {
	for p := range c.dirty {
		if _, ok := c.written[p]; ok {
			delete(c.dirty, p)
		}
	}
}

// settle makes every row follow its claim, and every row without a claim go.
func (c *claims) settle() {
	for p := range c.rows {
		if e, ok := c.effective(p); ok && c.written[p] != e {
			c.dirty[p] = struct{}{}
		}
	}
	for p := range c.written {
		if _, ok := c.rows[p]; !ok {
			c.dirty[p] = struct{}{}
		}
	}
}

func (c *claims) set(owner string, k rank, p netip.Prefix, e datapath.IPCacheEntry) {
	list := c.rows[p]
	if i := slices.IndexFunc(list, func(x claim) bool { return x.owner == owner }); i >= 0 {
		if list[i].entry == e {
			return
		}
		list[i].entry = e
	} else {
		list = append(list, claim{owner, k, e})
	}
	c.rows[p] = list
	c.dirty[p] = struct{}{}
}

func (c *claims) unset(owner string, p netip.Prefix) {
	list := slices.DeleteFunc(c.rows[p], func(x claim) bool { return x.owner == owner })
	if len(list) == 0 {
		delete(c.rows, p)
		delete(c.unplaced, p)
	} else {
		c.rows[p] = list
	}
	c.dirty[p] = struct{}{}
}

// effective is the entry that counts for a prefix.
func (c *claims) effective(p netip.Prefix) (datapath.IPCacheEntry, bool) {
	best, ok := c.best(p)
	return best.entry, ok
}

func (c *claims) best(p netip.Prefix) (claim, bool) {
	list := c.rows[p]
	if len(list) == 0 {
		return claim{}, false
	}
	best := list[0]
	for _, x := range list[1:] {
		if x.rank >= best.rank {
			best = x
		}
	}
	return best, true
}

// flush writes what changed: first what is added, then what goes, so that no address falls back to a wider prefix in between. A prefix whose
// write failed stays dirty; that there is no room for it is no error. between, if set, is called between the two; if it fails, nothing goes.
func (c *claims) flush(m IPCache, between func() error) error {
	var first error
	for _, removing := range []bool{false, true} {
		if removing && between != nil {
			if first != nil {
				return first
			}
			if err := between(); err != nil {
				return err
			}
		}
		for p := range c.dirty {
			x, present := c.best(p)
			if present == removing {
				continue
			}
			e := x.entry
			old, had := c.written[p]
			var err error
			switch {
			case present && had && old == e:
			case present && had:
				err = m.Upsert(p, e)
			case present:
				if err = c.room(x.rank); err == nil {
					err = m.Upsert(p, e)
				}
			default:
				err = m.Delete(p)
			}
			delete(c.unplaced, p)
			if errors.Is(err, datapath.ErrFull) || errors.Is(err, unix.ENOSPC) {
				c.unplaced[p] = err
				continue
			}
			if err != nil {
				if first == nil {
					first = err
				}
				continue
			}
			// A new row counts too: until now its addresses were those of a wider one.
			c.changed = c.changed || present != had || old != e
			if present {
				c.written[p] = e
			} else {
				delete(c.written, p)
			}
			delete(c.dirty, p)
		}
	}
	return first
}
