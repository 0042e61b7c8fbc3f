// SPDX-License-Identifier: Apache-2.0

package flow

import (
	"net/netip"
	"slices"
	"time"
)

const (
	// namedFor is how long an address keeps a name at least: connections outlive the answers that led to them.
	namedFor = time.Hour
	// maxNamed bounds the addresses with names, maxNames the names of one.
	maxNamed = 1 << 14
	maxNames = 8
	// expireNames is how often names are looked through.
	expireNames = 10 * time.Second
)

// names are those that DNS gave to addresses, as pods of this node were told.
type names map[netip.Addr][]named

type named struct {
	name  string
	until time.Time
}

// SetName says that DNS gave an address a name (without trailing dot) for ttl. Flows show it.
func (d *Directory) SetName(a netip.Addr, name string, ttl time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, changed := range d.names.set(a, named{name, d.now().Add(max(ttl, namedFor))}) {
		delete(d.ends, changed.As16())
	}
}

// set returns the addresses that have other names now.
func (n names) set(a netip.Addr, x named) []netip.Addr {
	list, known := n[a]
	if i := slices.IndexFunc(list, func(o named) bool { return o.name == x.name }); i >= 0 {
		list[i].until = x.until
		return nil
	}
	changed := []netip.Addr{a}
	if !known && len(n) >= maxNamed {
		for other := range n {
			// Any: whoever is asked for again gets its name again.
			delete(n, other)
			changed = append(changed, other)
			break
		}
	}
	if len(list) >= maxNames {
		oldest := 0
		for i := range list {
			if list[i].until.Before(list[oldest].until) {
				oldest = i
			}
		}
		list = slices.Delete(list, oldest, oldest+1)
	}
	n[a] = append(list, x)
	return changed
}

// of lists an address's names, sorted.
func (n names) of(a netip.Addr, now time.Time) []string {
	var list []string
	for _, x := range n[a] {
		if now.Before(x.until) {
			list = append(list, x.name)
		}
	}
	slices.Sort(list)
	return list
}

// expire forgets names whose time is over, and returns the addresses that lost one.
func (n names) expire(now time.Time) []netip.Addr {
	var changed []netip.Addr
	for a, list := range n {
		left := slices.DeleteFunc(list, func(x named) bool { return !now.Before(x.until) })
		if len(left) == len(list) {
			continue
		}
		changed = append(changed, a)
		if n[a] = left; len(left) == 0 {
			delete(n, a)
		}
	}
	return changed
}
