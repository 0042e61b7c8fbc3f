// SPDX-License-Identifier: Apache-2.0

package ads

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/weirmesh/weir/services/xds/internal/render"
)

func TestMentions(t *testing.T) {
	for _, test := range []struct {
		text, name string
		want       bool
	}{
		{"Error adding listener(s) slot-1: address in use", "slot-1", true},
		{"Error adding listener(s) slot-12: address in use", "slot-1", false},
		{`routes "http-1" are wrong`, "http-1", true},
		{"xhttp-1", "http-1", false},
		{"slot-12 and slot-1", "slot-1", true},
		{"cluster shop/api:80 is wrong", "shop/api", false},
		{"cluster shop/api: is wrong", "shop/api", true},
		{"it is shop/api.", "shop/api", true},
		{"it is shop/api.v2", "shop/api", false},
		{"", "slot-1", false},
	} {
		if got := mentions(test.text, test.name); got != test.want {
			t.Errorf("%q mentions %q: %v", test.text, test.name, got)
		}
	}
}

// TestHalving plays a client that refuses some of the resources without naming them: in the end it has all others, and the ones are known.
func TestHalving(t *testing.T) {
	random := rand.New(rand.NewPCG(5, 6))
	for range 300 {
		wanted := render.Set{}
		bad := map[string]bool{}
		for i := range 1 + random.IntN(40) {
			name := fmt.Sprintf("r%d", i)
			wanted[name] = &render.Resource{Name: name, Owner: name, Version: "new"}
			if random.IntN(8) == 0 {
				bad[name] = true
			}
		}
		h := newClient("test").types[render.Route]
		for name := range wanted {
			if random.IntN(2) == 0 {
				h.acked[name] = &render.Resource{Name: name, Owner: name, Version: "old"}
			}
		}
		before := len(h.acked)
		rounds := settle(h, wanted, bad)
		// There are less than 2n groups; each is sent once, and what it had before once more when it is refused.
		if limit := 3 + 4*len(wanted); rounds > limit {
			t.Errorf("%d rounds for %d resources with %d bad ones", rounds, len(wanted), len(bad))
		}
		for name, r := range wanted {
			e := h.effective(r)
			switch {
			case !bad[name] && e != r:
				t.Fatalf("%s is held back: %v", name, h.held[name])
			case bad[name] && (e == r || !h.held[name].found):
				t.Fatalf("%s is not found", name)
			case bad[name] && e != nil && e.Version != "old":
				t.Fatalf("%s has %v, not its last good version", name, e)
			}
		}
		if before > len(h.acked) {
			t.Fatal("good versions were forgotten")
		}
	}
}

// settle sends what is in effect until it is taken and nothing is left to try, and returns how often it sent.
func settle(h *holdings, wanted render.Set, bad map[string]bool) int {
	for rounds := 1; ; rounds++ {
		sent := render.Set{}
		refused := false
		for name, r := range wanted {
			if e := h.effective(r); e != nil {
				sent[name] = e
				refused = refused || bad[name] && e.Version == "new"
			}
		}
		if refused {
			h.refused(sent, "something is wrong")
			continue
		}
		h.took(sent)
		if !h.try(func(name string) *render.Resource { return wanted[name] }) {
			return rounds
		}
		if rounds > 1000 {
			return rounds
		}
	}
}

// TestRefusedAgain: what was taken before is not held back, whatever a client says of it.
func TestRefusedAgain(t *testing.T) {
	h := newClient("test").types[render.Listener]
	set := render.Set{"a": {Name: "a", Version: "1"}, "b": {Name: "b", Version: "1"}}
	h.took(set)
	if found := h.refused(set, "a and b are wrong"); len(found) > 0 || len(h.held) > 0 {
		t.Errorf("held back: %q", found)
	}
	next := render.Set{"a": set["a"], "b": {Name: "b", Version: "2"}}
	if found := h.refused(next, "a is wrong"); !slices.Equal(found, []string{"b"}) {
		t.Errorf("found %q, want the only one that is new", found)
	}
}

func FuzzClean(f *testing.F) {
	f.Add("slot-1 \x00 \xff", "slot-1")
	f.Fuzz(func(t *testing.T, text, name string) {
		if got := clean(text, 10); len(got) > 10+len("...")+10 {
			t.Errorf("%d bytes", len(got))
		}
		mentions(text, name)
	})
}
