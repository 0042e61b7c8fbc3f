// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/weirmesh/weir/test/e2e/httpload"
	"github.com/weirmesh/weir/test/e2e/l7bench"
	"github.com/weirmesh/weir/test/e2e/ratio"
)

// CPUs of the proxies, and of the load with its server.
const proxyCPU, loadCPU = 0, 1

// subject is one proxy in one setting.
type subject struct {
	name  string
	start func(ctx context.Context, dir string, s l7bench.Shape) (*l7bench.Process, func() error, error)
	shape l7bench.Shape
}

const l7Origin, l7First = "127.0.0.1:19000", 19100

func (b bench) l7Subjects() []subject {
	haproxy := func(ctx context.Context, dir string, s l7bench.Shape) (*l7bench.Process, func() error, error) {
		p, err := l7bench.HAProxy(ctx, dir, proxyCPU, s)
		return p, p.Stop, err
	}
	nginx := func(ctx context.Context, dir string, s l7bench.Shape) (*l7bench.Process, func() error, error) {
		p, err := l7bench.Nginx(ctx, dir, proxyCPU, s)
		return p, p.Stop, err
	}
	weir := func(rules bool) func(ctx context.Context, dir string, s l7bench.Shape) (*l7bench.Process, func() error, error) {
		return func(ctx context.Context, dir string, s l7bench.Shape) (*l7bench.Process, func() error, error) {
			w, err := l7bench.StartWeir(ctx, b.bin, dir, proxyCPU, s, rules)
			if err != nil {
				return nil, nil, err
			}
			return w.Process, w.Stop, nil
		}
	}
	return []subject{
		{"haproxy, no log", haproxy, l7bench.Shape{}},
		{"nginx, no log", nginx, l7bench.Shape{}},
		{"weir-proxy, no log", weir(false), l7bench.Shape{}},
		{"weir-proxy, a rule", weir(true), l7bench.Shape{}},
		{"haproxy, log", haproxy, l7bench.Shape{Log: true}},
		{"nginx, log", nginx, l7bench.Shape{Log: true}},
		{"weir-proxy, log", weir(false), l7bench.Shape{Log: true}},
		{"weir-proxy, a rule, log", weir(true), l7bench.Shape{Log: true}},
	}
}

// l7 compares proxies: each alone on one CPU, load and server on the other.
func (b bench) l7(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := l7bench.Pin(loadCPU); err != nil {
		return err
	}
	origin := make(chan error, 1)
	go func() { origin <- httpload.ServeOrigin(ctx, l7Origin) }()
	fmt.Println("\n# L7: proxies, one CPU each; 50 connections; the load and the server share the other CPU")
	fmt.Printf("%-26s %12s %14s %14s %22s %22s\n", "proxy", "requests/s", "of HAProxy", "CPU/request", "added at 1,000/s: p50", "p99")
	rates := map[string]*ratio.Pairs{}
	rows := map[string]l7Row{}
	for range b.pairs {
		direct, err := httpload.Load(ctx, l7Origin, 50, 1000, 2*b.duration, "/")
		if err != nil {
			return err
		}
		base := map[bool]float64{}
		for _, s := range b.l7Subjects() {
			row, err := b.l7Measure(ctx, s, direct)
			if err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
			if base[s.shape.Log] == 0 {
				base[s.shape.Log] = row.rate
			}
			if rates[s.name] == nil {
				rates[s.name] = &ratio.Pairs{}
			}
			rates[s.name].Add(row.rate, base[s.shape.Log])
			sum := rows[s.name]
			rows[s.name] = l7Row{sum.rate + row.rate, sum.cpu + row.cpu, sum.p50 + row.p50, sum.p99 + row.p99}
		}
	}
	n := float64(b.pairs)
	for _, s := range b.l7Subjects() {
		row := rows[s.name]
		fmt.Printf("%-26s %12.0f %14s %14s %22s %22s\n", s.name, row.rate/n, rates[s.name].Summary(), time.Duration(float64(row.cpu)/n).Round(100*time.Nanosecond),
			time.Duration(float64(row.p50)/n).Round(time.Microsecond), time.Duration(float64(row.p99)/n).Round(time.Microsecond))
	}
	if err := b.l7Sizes(ctx); err != nil {
		return err
	}
	cancel()
	return <-origin
}

type l7Row struct {
	rate          float64
	cpu, p50, p99 time.Duration
}

func (b bench) l7Measure(ctx context.Context, s subject, direct httpload.Result) (row l7Row, err error) {
	dir, err := os.MkdirTemp("", "weir-l7-")
	if err != nil {
		return row, err
	}
	defer os.RemoveAll(dir)
	s.shape.Origin, s.shape.First, s.shape.Dir = l7Origin, l7First, dir
	p, stop, err := s.start(ctx, dir, s.shape)
	if err != nil {
		return row, err
	}
	defer func() { _ = stop() }()
	if _, err := httpload.Load(ctx, p.Address, 50, 0, b.duration/2, "/"); err != nil { // warm
		return row, err
	}
	before, err := p.CPU()
	if err != nil {
		return row, err
	}
	full, err := httpload.Load(ctx, p.Address, 50, 0, 2*b.duration, "/")
	if err != nil {
		return row, err
	}
	after, err := p.CPU()
	if err != nil {
		return row, err
	}
	slow, err := httpload.Load(ctx, p.Address, 50, 1000, 2*b.duration, "/")
	if err != nil {
		return row, err
	}
	if full.Failed+slow.Failed > 0 {
		return row, fmt.Errorf("%d requests failed", full.Failed+slow.Failed)
	}
	return l7Row{
		rate: full.Rate(), cpu: (after - before) / time.Duration(full.Requests),
		p50: slow.Latency(0.5) - direct.Latency(0.5), p99: slow.Latency(0.99) - direct.Latency(0.99),
	}, nil
}

// l7Sizes measures memory with idle connections, listeners and routes.
func (b bench) l7Sizes(ctx context.Context) error {
	fmt.Printf("\n%-26s %16s %18s %16s %14s\n", "memory (MiB)", "started", "1,000 idle conns", "1,000 listeners", "5,000 routes")
	for _, s := range b.l7Subjects()[:3] {
		var cells []string
		for _, shape := range []struct {
			listeners, routes, idle int
		}{{1, 0, 0}, {1, 0, 1000}, {1000, 0, 0}, {1, 5000, 0}} {
			m, err := b.l7Memory(ctx, s, shape.listeners, shape.routes, shape.idle)
			if err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
			cells = append(cells, fmt.Sprintf("%.1f", float64(m)/(1<<20)))
		}
		fmt.Printf("%-26s %16s %18s %16s %14s\n", s.name, cells[0], cells[1], cells[2], cells[3])
	}
	return b.l7Add(ctx)
}

func (b bench) l7Memory(ctx context.Context, s subject, listeners, routes, idle int) (int, error) {
	dir, err := os.MkdirTemp("", "weir-l7-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	shape := l7bench.Shape{Origin: l7Origin, First: l7First, Listeners: listeners, Routes: routes, Dir: dir}
	p, stop, err := s.start(ctx, dir, shape)
	if err != nil {
		return 0, err
	}
	defer func() { _ = stop() }()
	if err := awaitPort(ctx, l7First+listeners-1); err != nil {
		return 0, err
	}
	if _, err := httpload.Load(ctx, p.Address, 4, 0, 200*time.Millisecond, "/route/4999/x"); err != nil {
		return 0, err
	}
	closeAll, err := httpload.Idle(ctx, p.Address, idle)
	defer closeAll()
	if err != nil {
		return 0, err
	}
	return p.Memory()
}

func awaitPort(ctx context.Context, port int) error {
	address := fmt.Sprintf("127.0.0.1:%d", port)
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		closeAll, err := httpload.Idle(ctx, address, 1)
		closeAll()
		if err == nil || time.Now().After(deadline) {
			return err
		}
	}
}

// l7Add measures how long the 1,001st listener takes, from its configuration to its first answer.
func (b bench) l7Add(ctx context.Context) error {
	dir, err := os.MkdirTemp("", "weir-l7-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	shape := l7bench.Shape{Origin: l7Origin, First: l7First, Listeners: 1000, Dir: dir}
	w, err := l7bench.StartWeir(ctx, b.bin, dir, proxyCPU, shape, true)
	if err != nil {
		return err
	}
	defer func() { _ = w.Stop() }()
	if err := awaitPort(ctx, l7First+999); err != nil {
		return err
	}
	shape.Listeners++
	begun := time.Now()
	if err := w.Configure(ctx, shape, true); err != nil {
		return err
	}
	if err := awaitPort(ctx, l7First+1000); err != nil {
		return err
	}
	fmt.Printf("the 1,001st listener of weir-proxy answers after %s\n", time.Since(begun).Round(100*time.Microsecond))
	return nil
}
