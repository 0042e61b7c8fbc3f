// SPDX-License-Identifier: Apache-2.0

package address_test

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"github.com/weirmesh/weir/services/agent/internal/address"
)

var t0 = time.Unix(1_700_000_000, 0)

func TestTakeOrder(t *testing.T) {
	p := address.NewPool(netip.MustParsePrefix("10.0.0.0/29"), time.Minute, address.Memory{}) // .2 .3 .4 .5 .6
	take := func(now time.Time) string {
		t.Helper()
		a, err := p.Take(now)
		if err != nil {
			t.Fatal(err)
		}
		return a.String()
	}
	if a, b := take(t0), take(t0); a != "10.0.0.2" || b != "10.0.0.3" {
		t.Fatalf("got %s, %s", a, b)
	}
	p.Release(netip.MustParseAddr("10.0.0.3"), t0)
	p.Release(netip.MustParseAddr("10.0.0.2"), t0.Add(time.Second))
	for _, want := range []string{"10.0.0.4", "10.0.0.5", "10.0.0.6"} {
		if got := take(t0); got != want {
			t.Errorf("got %s, want the never used %s", got, want)
		}
	}
	if _, err := p.Take(t0.Add(30 * time.Second)); !errors.Is(err, address.ErrExhausted) {
		t.Errorf("while all rest: %v", err)
	}
	if got := take(t0.Add(time.Hour)); got != "10.0.0.3" {
		t.Errorf("got %s, want 10.0.0.3, free the longest", got)
	}
	// A restart keeps the order.
	p = address.NewPool(p.Prefix(), time.Minute, p.Memory())
	for _, a := range []string{"10.0.0.3", "10.0.0.4", "10.0.0.5", "10.0.0.6"} {
		if err := p.Claim(netip.MustParseAddr(a)); err != nil {
			t.Fatal(err)
		}
	}
	if got := take(t0.Add(time.Hour)); got != "10.0.0.2" {
		t.Errorf("after a restart: got %s, want 10.0.0.2", got)
	}
	if _, err := p.Take(t0.Add(time.Hour)); !errors.Is(err, address.ErrExhausted) {
		t.Errorf("empty pool: %v", err)
	}
}

func TestClaim(t *testing.T) {
	tests := []struct {
		name, prefix, addr string
		want               error
	}{
		{"inside", "10.0.0.0/24", "10.0.0.77", nil},
		{"v6 far inside", "fd00:1::/64", "fd00:1::dead:beef", nil},
		{"taken", "10.0.0.0/24", "10.0.0.2", address.ErrTaken},
		{"network", "10.0.0.0/24", "10.0.0.0", address.ErrOutside},
		{"gateway", "10.0.0.0/24", "10.0.0.1", address.ErrOutside},
		{"broadcast", "10.0.0.0/24", "10.0.0.255", address.ErrOutside},
		{"another prefix", "10.0.0.0/24", "10.0.1.7", address.ErrOutside},
		{"another family", "10.0.0.0/24", "fd00::7", address.ErrOutside},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := address.NewPool(netip.MustParsePrefix(tt.prefix), time.Minute, address.Memory{})
			if _, err := p.Take(t0); err != nil {
				t.Fatal(err)
			}
			if err := p.Claim(netip.MustParseAddr(tt.addr)); !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
}

func TestTakeSkipsClaimed(t *testing.T) {
	p := address.NewPool(netip.MustParsePrefix("fd00:1::/64"), time.Minute, address.Memory{})
	if err := p.Claim(netip.MustParseAddr("fd00:1::2")); err != nil {
		t.Fatal(err)
	}
	for range 300 {
		a, err := p.Take(t0)
		if err != nil || a == netip.MustParseAddr("fd00:1::2") {
			t.Fatalf("got %s, %v", a, err)
		}
	}
	if a, _ := p.Take(t0); a != netip.MustParseAddr("fd00:1::12f") {
		t.Errorf("got %s, want fd00:1::12f, the 302nd", a)
	}
}

func TestIDs(t *testing.T) {
	ids := address.NewIDs(65533)
	if !ids.Claim(1) || ids.Claim(1) || ids.Claim(0) {
		t.Error("claim of 1, of 1 again, of 0: want true, false, false")
	}
	a, errA := ids.Take()
	b, errB := ids.Take()
	if a != 65534 || b != 2 || errA != nil || errB != nil {
		t.Errorf("got %d, %d, want 65534, 2 (65535 is the node, 0 no number, 1 is taken)", a, b)
	}
	ids.Release(2)
	if c, _ := ids.Take(); c != 3 {
		t.Errorf("got %d, want 3: what was freed waits for its turn", c)
	}
	for {
		if _, err := ids.Take(); err != nil {
			break
		}
	}
	ids.Release(77)
	if c, err := ids.Take(); c != 77 || err != nil {
		t.Errorf("got %d, %v, want the only free number 77", c, err)
	}
}
