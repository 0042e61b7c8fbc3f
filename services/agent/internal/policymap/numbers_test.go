// SPDX-License-Identifier: Apache-2.0

package policymap

import (
	"path/filepath"
	"testing"
	"time"

	"github.com/weirmesh/weir/bpf/datapath"
)

// When all numbers were given once, those that policies have, or that weir-dns may have rows of, are passed over; also by a new agent.
func TestNumbersComeAround(t *testing.T) {
	path := filepath.Join(t.TempDir(), "numbers")
	load := func() *numbers {
		t.Helper()
		n, err := loadNumbers(path, time.Now)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	n := load()
	named, plain := n.policy("named"), n.policy("plain")
	n.reserve([]uint32{named})
	delete(n.policies, "named") // it has rested
	delete(n.given, named)
	n.nextPolicy = datapath.MaxPolicy
	if err := n.save(); err != nil {
		t.Fatal(err)
	}
	n = load()
	for i, want := range []uint32{datapath.MaxPolicy, plain + 1} {
		if got := n.policy(string(rune('a' + i))); got != want {
			t.Errorf("number %d, want %d", got, want)
		}
	}
	delete(n.named, named)
	n.nextPolicy = datapath.MaxPolicy
	if got := n.policy("c"); got != named {
		t.Errorf("number %d, want %d, which is free again", got, named)
	}
}
