// SPDX-License-Identifier: Apache-2.0

package ads

import (
	"fmt"
	"slices"
	"strings"

	"github.com/weirmesh/weir/services/xds/internal/render"
)

// client is one kind of xDS client on a node: what a program of one version refuses says nothing of another one. It outlives its streams.
type client struct {
	name    string
	types   [4]*holdings
	streams int
}

func newClient(name string) *client {
	c := &client{name: name}
	for i := range c.types {
		c.types[i] = &holdings{acked: render.Set{}, held: map[string]*hold{}}
	}
	return c
}

// holdings is what a client took and refused of one type.
//
// A refusal that names resources holds those back; one that names none holds back all that were new to the client, and lets them through again by
// halves, until the ones are found that it refuses alone. Meanwhile the client has the last version that it took, or none.
type holdings struct {
	acked render.Set
	held  map[string]*hold
	// suspects are groups of held names that were not yet tried by themselves; trial is the one that is.
	suspects [][]string
	trial    []string
}

// hold keeps one version of a resource from a client.
type hold struct {
	version string
	owner   string
	message string
	// fallback is the version that stands in for it; "" = none.
	fallback string
	// found: it was refused by name, or alone. Else it is only under suspicion.
	found bool
}

// effective returns what a client gets in the place of a resource; nil = nothing.
func (h *holdings) effective(r *render.Resource) *render.Resource {
	held := h.held[r.Name]
	if held == nil || held.version != r.Version || slices.Contains(h.trial, r.Name) {
		return r
	}
	if last := h.acked[r.Name]; last != nil && last.Version != r.Version {
		return last
	}
	return nil
}

// took notes that a client has these resources in force.
func (h *holdings) took(sent render.Set) (cleared bool) {
	for name, r := range sent {
		h.acked[name] = r
		// That it took what stands in for a held version says nothing of that version.
		if held := h.held[name]; held != nil && (held.version == r.Version || held.fallback != r.Version) {
			cleared = h.clear(name) || cleared
		}
	}
	return cleared
}

// clear ends a hold; it reports whether somebody was told of it.
func (h *holdings) clear(name string) bool {
	found := h.held[name].found
	delete(h.held, name)
	h.trial = slices.DeleteFunc(h.trial, func(other string) bool { return other == name })
	return found
}

// lags reports whether an older version stands in for a held one.
func (h *holdings) lags() bool {
	for _, held := range h.held {
		if held.fallback != "" {
			return true
		}
	}
	return false
}

// refused notes that a client refused what was sent, and returns the names of those that are to blame, as far as that is known.
func (h *holdings) refused(sent render.Set, message string) (found []string) {
	var fresh []string
	for _, name := range sent.Names() {
		if last := h.acked[name]; last == nil || last.Version != sent[name].Version {
			fresh = append(fresh, name)
		}
	}
	h.trial = nil
	if len(fresh) == 0 {
		return nil // it took all of this before
	}
	guilty := slices.DeleteFunc(slices.Clone(fresh), func(name string) bool { return !mentions(message, name) })
	if len(guilty) == 0 && len(fresh) == 1 {
		guilty = fresh
	}
	if len(guilty) > 0 {
		for _, name := range guilty {
			h.hold(sent[name], message, true)
		}
		return guilty
	}
	for _, name := range fresh {
		h.hold(sent[name], message, false)
	}
	middle := len(fresh) / 2
	h.suspects = append([][]string{fresh[:middle], fresh[middle:]}, h.suspects...)
	return nil
}

func (h *holdings) hold(r *render.Resource, message string, found bool) {
	held := &hold{version: r.Version, owner: r.Owner, message: message, found: found}
	if last := h.acked[r.Name]; last != nil {
		held.fallback = last.Version
	}
	h.held[r.Name] = held
}

// try lets the next group of suspects through; it reports whether there is one. Call it when the client has nothing unanswered.
func (h *holdings) try(find func(name string) *render.Resource) bool {
	for len(h.suspects) > 0 && len(h.trial) == 0 {
		for _, name := range h.suspects[0] {
			held, r := h.held[name], find(name)
			switch {
			case held == nil || held.found:
			case r == nil || r.Version != held.version:
				h.clear(name) // it changed, or is gone: nothing is known of the new one
			default:
				h.trial = append(h.trial, name)
			}
		}
		h.suspects = h.suspects[1:]
	}
	return len(h.trial) > 0
}

// forget drops what is not wanted any more, and holds on versions that were taken back.
func (h *holdings) forget(find func(name string) *render.Resource) {
	for name := range h.acked {
		if find(name) == nil {
			delete(h.acked, name)
		}
	}
	for name, held := range h.held {
		r := find(name)
		if r == nil || r.Version != held.version && r.Version == held.fallback {
			h.clear(name)
		}
	}
}

// mentions reports whether a text names a resource: as a whole word, since slot-1 is not slot-12.
func mentions(text, name string) bool {
	for at := 0; ; {
		i := strings.Index(text[at:], name)
		if i < 0 {
			return false
		}
		i += at
		end := i + len(name)
		if (i == 0 || !isNameByte(text[i-1])) && ends(text[end:]) {
			return true
		}
		at = i + 1
	}
}

// ends reports whether a name is complete before this text: what stands between two of its characters belongs to it.
func ends(rest string) bool {
	if len(rest) > 1 && (rest[0] == ':' || rest[0] == '.') && isNameByte(rest[1]) {
		return false
	}
	return rest == "" || !isNameByte(rest[0])
}

func isNameByte(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-' || c == '_' || c == '/' || c == '#'
}

// maxMessage of what a client said is kept.
const maxMessage = 1024

// problems adds what the client refuses, by owner.
func (c *client) problems(into map[string]string) {
	for i, h := range c.types {
		names := make([]string, 0, len(h.held))
		for name, held := range h.held {
			if held.found {
				names = append(names, name)
			}
		}
		slices.Sort(names)
		for _, name := range names {
			held := h.held[name]
			if _, known := into[held.owner]; !known && held.owner != "" {
				into[held.owner] = fmt.Sprintf("%s refused %s %s: %s", c.name, render.Type(i), name, held.message)
			}
		}
	}
}
