// SPDX-License-Identifier: Apache-2.0

package mirror

import (
	"net/netip"
	"slices"

	"github.com/weirmesh/weir/bpf/datapath"
)

// claim is one owner's word on a prefix.
type claim struct {
	owner string
	entry datapath.IPCacheEntry
}

// claims is the desired ipcache. An address may have two owners for a moment (a new pod has a fixed address before the old one's removal
// arrives): the one that came last counts, and when it goes, the other one counts again.
type claims struct {
	rows  map[netip.Prefix][]claim
	dirty map[netip.Prefix]struct{}
}

func newClaims() claims {
	return claims{rows: map[netip.Prefix][]claim{}, dirty: map[netip.Prefix]struct{}{}}
}

func (c *claims) set(owner string, p netip.Prefix, e datapath.IPCacheEntry) {
	list := c.rows[p]
	if i := slices.IndexFunc(list, func(x claim) bool { return x.owner == owner }); i >= 0 {
		if list[i].entry == e {
			return
		}
		list[i].entry = e
	} else {
		list = append(list, claim{owner, e})
	}
	c.rows[p] = list
	c.dirty[p] = struct{}{}
}

func (c *claims) unset(owner string, p netip.Prefix) {
	list := slices.DeleteFunc(c.rows[p], func(x claim) bool { return x.owner == owner })
	if len(list) == 0 {
		delete(c.rows, p)
	} else {
		c.rows[p] = list
	}
	c.dirty[p] = struct{}{}
}

// effective is the entry that counts for a prefix.
func (c *claims) effective(p netip.Prefix) (datapath.IPCacheEntry, bool) {
	list := c.rows[p]
	if len(list) == 0 {
		return datapath.IPCacheEntry{}, false
	}
	return list[len(list)-1].entry, true
}

// flush writes what changed: first what is added, then what goes, so that no address falls back to a wider prefix in between. A prefix whose
// write failed stays dirty.
func (c *claims) flush(m IPCache) error {
	var first error
	for _, removing := range []bool{false, true} {
		for p := range c.dirty {
			e, present := c.effective(p)
			if present == removing {
				continue
			}
			var err error
			if present {
				err = m.Upsert(p, e)
			} else {
				err = m.Delete(p)
			}
			if err != nil {
				if first == nil {
					first = err
				}
				continue
			}
			delete(c.dirty, p)
		}
	}
	return first
}

// prune deletes rows that nobody claims.
func (c *claims) prune(m IPCache) error {
	rows, err := m.List()
	if err != nil {
		return err
	}
	var first error
	for _, r := range rows {
		if _, ok := c.rows[r.Prefix]; ok {
			continue
		}
		if err := m.Delete(r.Prefix); err != nil && first == nil {
			first = err
		}
	}
	return first
}
