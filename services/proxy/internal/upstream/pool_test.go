// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"testing"
	"time"

	"github.com/weirmesh/weir/services/proxy/internal/model"
)

// cluster dials whatever endpoint it is told.
type cluster struct{ generation uint64 }

func (cluster) Name() string                  { return "c" }
func (cluster) Protocol() model.Protocol      { return model.HTTP1 }
func (cluster) ConnectTimeout() time.Duration { return 5 * time.Second }
func (cluster) Retry() (func(), bool)         { return nil, false }
func (c cluster) Generation() uint64          { return c.generation }

func (cluster) Acquire(*model.Conn, []netip.AddrPort) (model.Endpoint, func(bool), error) {
	return model.Endpoint{}, nil, model.ErrNoEndpoint
}

func (cluster) Dial(ctx context.Context, _ *model.Conn, e model.Endpoint) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, "tcp", e.Address.String())
}

func client(n int) *model.Conn {
	return &model.Conn{Remote: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(n >> 8), byte(n)}), 1000)}
}

func TestIdleIsBounded(t *testing.T) {
	for _, lib := range []bool{false, true} {
		t.Run(fmt.Sprintf("library=%v", lib), func(t *testing.T) {
			s := httptest.NewServer(http.NotFoundHandler())
			defer s.Close()
			e := model.Endpoint{Address: netip.MustParseAddrPort(s.Listener.Addr().String())}
			p := NewPool(Config{MaxIdle: 10, MaxIdleLane: 3, IdleTimeout: time.Hour, Library: lib})
			get := func(n int, generation uint64) *Conn {
				t.Helper()
				c, err := p.Get(t.Context(), client(n), cluster{generation}, e, model.HTTP1, false)
				if err != nil {
					t.Fatal(err)
				}
				return c
			}
			var held []*Conn
			for range 5 {
				held = append(held, get(1, 0))
			}
			for _, c := range held {
				c.Release(true)
			}
			if idle, lanes := p.Idle(); idle != 3 || lanes != 1 {
				t.Errorf("one lane: %d idle in %d lanes", idle, lanes)
			}
			if c := get(1, 0); !c.Used() {
				t.Error("an idle connection was not used")
			} else {
				c.Release(true)
			}
			if c := get(1, 1); c.Used() {
				t.Error("a connection of an older configuration was used")
			} else {
				c.Release(false)
			}
			for n := range 30 {
				get(100+n, 0).Release(true)
			}
			if idle, _ := p.Idle(); idle != 10 {
				t.Errorf("%d idle in all", idle)
			}
			p.reap(time.Now().Add(-time.Hour), false, false)
			if idle, _ := p.Idle(); idle != 10 {
				t.Errorf("%d idle after a reaping of nothing", idle)
			}
			p.reap(time.Now().Add(time.Hour), false, false)
			if idle, lanes := p.Idle(); idle != 0 || lanes != 0 {
				t.Errorf("reaped: %d idle in %d lanes", idle, lanes)
			}
		})
	}
}

// Streams of one client share an HTTP/2 connection; those of two never do.
func TestSharedByStreamsOnly(t *testing.T) {
	s := httptest.NewUnstartedServer(http.NotFoundHandler())
	s.Config.Protocols = new(http.Protocols)
	s.Config.Protocols.SetUnencryptedHTTP2(true)
	s.Start()
	defer s.Close()
	e := model.Endpoint{Address: netip.MustParseAddrPort(s.Listener.Addr().String())}
	p := NewPool(Config{})
	defer p.CloseIdle()
	get := func(n int) *Conn {
		t.Helper()
		c, err := p.Get(t.Context(), client(n), cluster{}, e, model.HTTP2, false)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	a, b, other := get(1), get(1), get(2)
	if a != b || a == other {
		t.Errorf("same client: shared %v; other client: shared %v", a == b, a == other)
	}
	for _, c := range []*Conn{a, b, other} {
		c.Release(true)
	}
	if idle, lanes := p.Idle(); idle != 2 || lanes != 2 {
		t.Errorf("%d idle in %d lanes", idle, lanes)
	}
}
