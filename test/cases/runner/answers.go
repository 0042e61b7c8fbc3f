// SPDX-License-Identifier: Apache-2.0

package runner

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/weirmesh/weir/test/cases/format"
	"github.com/weirmesh/weir/test/cases/probe"
)

// resolveAnswers makes the queries whose answers a case says came back at a time; those of one client for one name one after the other.
func (g *game) resolveAnswers(ctx context.Context, at float64) error {
	queries := map[string][]int{}
	for i := range g.c.DNSAnswers {
		if d := &g.c.DNSAnswers[i]; d.At == at {
			key := d.Client + " " + strings.ToLower(strings.TrimSuffix(d.Name, "."))
			queries[key] = append(queries[key], i)
		}
	}
	var wait sync.WaitGroup
	errs := make([]error, len(g.c.DNSAnswers))
	for _, list := range queries {
		wait.Go(func() {
			for _, i := range list {
				if err := g.resolveAnswer(ctx, &g.c.DNSAnswers[i]); err != nil {
					errs[i] = fmt.Errorf("dns_answers[%d]: %w", i, err)
				}
			}
		})
	}
	wait.Wait()
	return errors.Join(errs...)
}

// nameLimit is how long a query may take before another server is asked.
const nameLimit = 1500 * time.Millisecond

// resolveAnswer asks the servers that lists of names lead the client to, until one answers through the proxy; if none does, those that it may know otherwise,
// until one answers. Where nobody does, no answer can have come.
func (g *game) resolveAnswer(ctx context.Context, d *format.DNSAnswer) error {
	var addresses []netip.Addr
	kinds := []dnsmessage.Type{dnsmessage.TypeA}
	for _, text := range d.IPs {
		a, err := netip.ParseAddr(text)
		if err != nil {
			return fmt.Errorf("ips: %w", err)
		}
		addresses = append(addresses, a)
		if a.Is6() && len(kinds) == 1 {
			kinds = append(kinds, dnsmessage.TypeAAAA)
		}
	}
	// Only one of both protocols may be restricted, or allowed.
	listed, usual := g.c.Servers(d.Client)
	for _, protocol := range []string{format.UDP, format.TCP} {
		for _, s := range listed {
			if _, proxied := g.resolveVia(ctx, d, s, protocol, addresses, kinds); proxied {
				return nil
			}
		}
	}
	for _, protocol := range []string{format.UDP, format.TCP} {
		for _, s := range usual {
			if came, _ := g.resolveVia(ctx, d, s, protocol, addresses, kinds); came {
				return nil
			}
		}
	}
	return nil
}

// resolveVia asks one server, and reports whether it answered, and through a proxy.
func (g *game) resolveVia(
	ctx context.Context, d *format.DNSAnswer, s format.Server, protocol string, addresses []netip.Addr, kinds []dnsmessage.Type,
) (came, proxied bool) {
	m, err := g.connection(ctx, format.Flow{From: d.Client, To: s.End, Port: s.Port, Protocol: protocol})
	if err != nil {
		return false, false // of another family
	}
	defer m.connection.Close()
	g.net.Answer(m.source, d.Name, addresses, uint32(d.TTL))
	before := g.flows.Mark(m.connection.Tuples())
	for _, kind := range kinds {
		limited, cancel := context.WithTimeout(ctx, nameLimit)
		limited, stop := g.untilDropped(limited, before)
		l := m.connection.Resolve(limited, probe.Query{Name: d.Name, Type: kind})
		stop()
		cancel()
		if !l.Answered || l.RCode != dnsmessage.RCodeSuccess {
			return came, false
		}
		came, proxied = true, l.Source.Port() != m.connection.Local().Port()
	}
	return came, proxied
}
