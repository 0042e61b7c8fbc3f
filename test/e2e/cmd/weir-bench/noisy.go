// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/weirmesh/weir/test/e2e/httpload"
	"github.com/weirmesh/weir/test/e2e/l7bench"
	"github.com/weirmesh/weir/test/e2e/ratio"
)

// Addresses of part noisy: the tenants' servers, and the ports of the quiet one's listener, and of the noisy one's in the shared proxy and in its own.
const (
	quietOrigin, noisyOrigin          = "127.0.0.1:19001", "127.0.0.1:19002"
	quietPort, sharedPort, secondPort = 19201, 19202, 19203
	sharedAdmin, secondAdmin          = "127.0.0.1:19211", "127.0.0.1:19212"
)

// The quiet tenant's load, and the noisy one's configuration: as many routes by dear expressions as a namespace may have (some 195,000 of 200,000 instructions), and how often it is
// given anew and its rule is edited.
const (
	quietConnections, quietRate = 20, 500
	noisyRegexes                = 900
	hugeEvery, editEvery        = time.Second, 100 * time.Millisecond
)

// noise is what the noisy tenant does during a measurement, and to which proxy.
type noise struct {
	name           string
	flood, configs bool
	second         bool
}

var noises = []noise{
	{name: "nothing"},
	{name: "flood", flood: true}, {name: "flood", flood: true, second: true},
	{name: "configurations", configs: true}, {name: "configurations", configs: true, second: true},
	{name: "both", flood: true, configs: true}, {name: "both", flood: true, configs: true, second: true},
}

func (n noise) String() string {
	switch {
	case n.name == noises[0].name:
		return n.name
	case n.second:
		return n.name + ", to a second proxy"
	}
	return n.name + ", to the shared proxy"
}

// noisyRow is what became of the quiet tenant's requests beside a noise, and what the flood came to.
type noisyRow struct {
	p50, p99, max, late []float64
	failed, sent        int
	flooded             httpload.Flooded
}

// neighbours are two tenants: the quiet one's traffic goes through the shared proxy, the noisy one's through that or through a second.
//
// They are proxies alone and not a lab: there, agent, relay, NATS and observer take their share of the two CPUs for what the flood makes of flows, in one of
// the settings and the other, and no CPU can be kept for the quiet tenant's load. Both proxies have one thread on one CPU, so that what the noise takes
// from the quiet tenant is the same whether the kernel divides the CPU among two processes or one process among two tenants.
type neighbours struct {
	b              bench
	shared, second *l7bench.Weir
	quiet, noisy   l7bench.Shape
	// How often the noisy one's configuration and its rule were changed.
	huge, edits int
}

// noisyPart measures the quiet tenant's requests.
func (b bench) noisyPart(ctx context.Context) (err error) {
	if err := l7bench.Require("taskset", "chrt", "nice"); err != nil {
		return err
	}
	unpin, err := l7bench.Pin(loadCPU)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unpin()) }()
	dir, err := os.MkdirTemp("", "weir-noisy-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	n := &neighbours{b: b,
		quiet: l7bench.Shape{Namespace: "quiet", Origin: quietOrigin, First: quietPort, Rule: everything, Log: true},
		noisy: l7bench.Shape{Namespace: "noisy", Origin: noisyOrigin, First: sharedPort, Rule: everything, Log: true},
	}
	stop, err := n.start(ctx, dir)
	defer func() { err = errors.Join(err, stop()) }()
	if err != nil {
		return err
	}
	rows := map[noise]*noisyRow{}
	for round := range b.pairs {
		for i := range noises {
			s := noises[(i+round)%len(noises)]
			if rows[s] == nil {
				rows[s] = &noisyRow{}
			}
			if err := n.measure(ctx, s, rows[s]); err != nil {
				return fmt.Errorf("%s: %w", s, err)
			}
		}
	}
	printNoisy(rows)
	return n.printRefused(ctx)
}

// start starts servers and proxies; the function that it returns ends what was started.
func (n *neighbours) start(ctx context.Context, dir string) (stop func() error, err error) {
	var stops []func() error
	stop = func() (err error) {
		for _, s := range stops {
			err = errors.Join(err, s())
		}
		return err
	}
	bench := n.b.l7bench()
	quiet, err := bench.UrgentOrigin(ctx, dir, quietOrigin)
	if err != nil {
		return stop, err
	}
	stops = append(stops, quiet.Stop)
	noisy, err := bench.Sink(ctx, dir, noisyOrigin)
	if err != nil {
		return stop, err
	}
	stops = append(stops, noisy.Stop)
	// The bounds are those of TestNoisyNeighbour: an operator's who has small tenants.
	flags := []string{"--tenant-connections=64", "--tenant-accept-rate=200"}
	weir := func(name, admin string, shapes ...l7bench.Shape) (*l7bench.Weir, error) {
		own := filepath.Join(dir, name)
		if err := os.Mkdir(own, 0o700); err != nil {
			return nil, err
		}
		w, err := l7bench.StartWeir(ctx, n.b.bin, own, proxyCPU, append(flags, "--admin-listen="+admin), shapes...)
		if err == nil {
			stops = append(stops, w.Stop)
		}
		return w, err
	}
	if n.shared, err = weir("shared", sharedAdmin, n.quiet, n.noisy); err != nil {
		return stop, err
	}
	n.second, err = weir("second", secondAdmin, at(n.noisy, secondPort))
	return stop, err
}

// at is a shape at another port.
func at(s l7bench.Shape, port int) l7bench.Shape {
	s.First = port
	return s
}

// configure gives the noisy tenant's part of the configuration to the proxy that is its.
func (n *neighbours) configure(ctx context.Context, second bool, noisy l7bench.Shape) error {
	if second {
		return n.second.Configure(ctx, at(noisy, secondPort))
	}
	return n.shared.Configure(ctx, n.quiet, noisy)
}

// measure is the quiet tenant's load beside a noise, from when both proxies are at rest.
func (n *neighbours) measure(ctx context.Context, s noise, row *noisyRow) error {
	if err := errors.Join(n.configure(ctx, s.second, n.noisy), n.rest(ctx)); err != nil {
		return err
	}
	over := 3 * n.b.duration
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	configuring, stop := context.WithCancel(ctx)
	defer stop()
	var beside sync.WaitGroup
	var flooded, configured error
	if s.flood {
		beside.Go(func() { flooded = n.flood(ctx, s.second, over, &row.flooded) })
	}
	if s.configs {
		beside.Go(func() { configured = n.push(configuring, s.second) })
	}
	r, err := n.b.l7bench().Load(ctx, n.shared.Address, quietConnections, quietRate, over)
	stop()
	beside.Wait()
	err = errors.Join(err, flooded, configured)
	row.p50, row.p99 = append(row.p50, micros(r.Median)), append(row.p99, micros(r.P99))
	row.max, row.late = append(row.max, micros(r.Max)), append(row.late, micros(r.Late))
	row.failed += r.Failed
	row.sent += r.Requests + r.Failed
	return err
}

// flood floods the proxy that is the noisy tenant's.
func (n *neighbours) flood(ctx context.Context, second bool, over time.Duration, sum *httpload.Flooded) error {
	port := sharedPort
	if second {
		port = secondPort
	}
	f, err := n.b.l7bench().Flood(ctx, fmt.Sprintf("127.0.0.1:%d", port), over)
	sum.Requests += f.Requests
	sum.Bodies += f.Bodies
	sum.Connections += f.Connections
	return err
}

// push changes the noisy tenant's configuration until ctx ends. What it gave before, it does not give again: nothing is to be saved by remembering.
func (n *neighbours) push(ctx context.Context, second bool) error {
	ticks := time.NewTicker(editEvery)
	defer ticks.Stop()
	for last := time.Now().Add(-hugeEvery); ; {
		noisy := n.noisy
		n.edits++
		noisy.Rule = fmt.Sprintf("/(.*|%d)", n.edits)
		if time.Since(last) >= hugeEvery {
			last = last.Add(hugeEvery)
			n.huge++
		}
		noisy.Regexes, noisy.Salt = noisyRegexes, n.huge
		if err := n.configure(ctx, second, noisy); err != nil && ctx.Err() == nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticks.C:
		}
	}
}

// restful is how much of the CPU proxies at rest may take.
const restful = 0.05

// rest waits until the proxies have done what the last noise left them to do.
func (n *neighbours) rest(ctx context.Context) error {
	const window = 200 * time.Millisecond
	used := func() (time.Duration, error) {
		a, err := n.shared.CPU()
		b, err2 := n.second.CPU()
		return a + b, errors.Join(err, err2)
	}
	for deadline := time.Now().Add(time.Minute); ; {
		before, err := used()
		if err != nil {
			return err
		}
		time.Sleep(window)
		after, err := used()
		if err != nil {
			return err
		}
		if float64(after-before) <= restful*float64(window) {
			return ctx.Err()
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the proxies are not at rest: %s of CPU in %s", after-before, window)
		}
	}
}

func printNoisy(rows map[noise]*noisyRow) {
	alone := rows[noises[0]]
	fmt.Printf("\n# Noisy neighbour: a quiet tenant's requests at %d/s on %d connections beside what another does, us from when a request was due; medians of %d rounds (middle 80 %%)\n",
		quietRate, quietConnections, len(alone.p50))
	fmt.Println("both proxies have one thread on one CPU; servers and loads are on the other, the quiet tenant's before everything else; the generator's own p99 of sending late:",
		spread(ratio.SpreadOf(alone.late)))
	t := table()
	fmt.Fprintln(t, "the other tenant's\tp50\tp99\tmax\tfailed\tp99, shared / second\tflood: requests, bodies, connections\t")
	for i, s := range noises {
		row := rows[s]
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%d of %d\t", s, spread(ratio.SpreadOf(row.p50)), spread(ratio.SpreadOf(row.p99)), spread(ratio.SpreadOf(row.max)), row.failed, row.sent)
		against := ""
		if i > 0 && !s.second {
			against = quotient(row.p99, rows[noises[i+1]].p99)
		}
		fmt.Fprintf(t, "%s\t", against)
		if s.flood {
			fmt.Fprintf(t, "%d, %d, %d\t", row.flooded.Requests, row.flooded.Bodies, row.flooded.Connections)
		}
		fmt.Fprintln(t)
	}
	_ = t.Flush() // standard output
}

// printRefused says whom the proxies' counters name.
func (n *neighbours) printRefused(ctx context.Context) error {
	proxies := []struct{ name, admin string }{{"shared", sharedAdmin}, {"second", secondAdmin}}
	for _, p := range proxies {
		text, err := l7bench.Scrape(ctx, p.admin)
		if err != nil {
			return err
		}
		for line := range strings.Lines(text) {
			if strings.HasPrefix(line, "weir_proxy_refused_total{") {
				fmt.Printf("%s proxy: %s", p.name, line)
			}
		}
	}
	return nil
}
