// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/weirmesh/weir/test/e2e/httpload"
	"github.com/weirmesh/weir/test/e2e/l7bench"
)

// CPUs of the proxies, and of the loads with their servers.
const proxyCPU, loadCPU = 0, 1

// Addresses of part l7: the server's, and the ports of the proxies that are loaded and of those that are measured for their size.
const l7Origin, l7First, l7Sized = "127.0.0.1:19000", 19100, 20000

// The load at which latency is measured.
const l7Connections, l7Rate = 50, 1000

func (b bench) l7bench() l7bench.Bench {
	return l7bench.Bench{Bin: b.bin, LoadCPU: loadCPU}
}

// subject is one proxy in one setting.
type subject struct {
	name  string
	start func(ctx context.Context, dir string, s l7bench.Shape) (running, error)
	shape l7bench.Shape
	// against is the subject of the same setting that it is compared with.
	against string
}

// running is a subject that runs.
type running struct {
	*l7bench.Process
	stop      func() error
	configure func(ctx context.Context, s l7bench.Shape) error
	// lines is how many lines of its access log came; nil = not known.
	lines func() uint64
}

// everything is the rule of the rows with a rule: it is evaluated, and allows.
const everything = "/.*"

func (b bench) l7Subjects() []subject {
	none := l7bench.Shape{Namespace: "bench"}
	log, rule := none, none
	log.Log, rule.Rule = true, everything
	both := log
	both.Rule = everything
	return []subject{
		{noProxy, nil, none, ""},
		{"haproxy, no log", b.haproxy, none, ""}, {"nginx, no log", b.nginx, none, "haproxy, no log"},
		{"weir-proxy, no log", b.weirProxy, none, "haproxy, no log"}, {"weir-proxy, a rule, no log", b.weirProxy, rule, "haproxy, no log"},
		{"haproxy, log", b.haproxy, log, ""}, {"nginx, log", b.nginx, log, "haproxy, log"},
		{"weir-proxy, log", b.weirProxy, log, "haproxy, log"}, {"weir-proxy, a rule, log", b.weirProxy, both, "haproxy, log"},
	}
}

// noProxy is the server alone: the floor of the generator, the server and the kernel.
const noProxy = "no proxy"

func (b bench) haproxy(ctx context.Context, dir string, s l7bench.Shape) (running, error) {
	p, err := l7bench.HAProxy(ctx, dir, proxyCPU, s)
	if err != nil {
		return running{}, err
	}
	reloads := -1
	return running{Process: p, stop: p.Stop, configure: func(ctx context.Context, s l7bench.Shape) error {
		reloads++
		return l7bench.ReloadHAProxy(ctx, p, dir, s, reloads)
	}}, nil
}

func (b bench) nginx(ctx context.Context, dir string, s l7bench.Shape) (running, error) {
	p, err := l7bench.Nginx(ctx, dir, proxyCPU, s)
	if err != nil {
		return running{}, err
	}
	return running{Process: p, stop: p.Stop, configure: func(_ context.Context, s l7bench.Shape) error { return l7bench.ReloadNginx(p, dir, s) }}, nil
}

func (b bench) weirProxy(ctx context.Context, dir string, s l7bench.Shape) (running, error) {
	w, err := l7bench.StartWeir(ctx, b.bin, dir, proxyCPU, nil, s)
	if err != nil {
		return running{}, err
	}
	return running{Process: w.Process, stop: w.Stop, configure: func(ctx context.Context, s l7bench.Shape) error { return w.Configure(ctx, s) }, lines: w.Lines}, nil
}

// l7 compares proxies: each with one thread on one CPU, servers and loads on the other. All run from the beginning to the end, so that no round begins with
// a cold one; those that are not loaded take no time. The order turns from round to round.
func (b bench) l7(ctx context.Context) (err error) {
	if err := l7bench.Require("taskset", "chrt", "haproxy", "nginx"); err != nil {
		return err
	}
	unpin, err := l7bench.Pin(loadCPU)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unpin()) }()
	dir, err := os.MkdirTemp("", "weir-l7-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	origin, err := b.l7bench().Origin(ctx, dir, l7Origin)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, origin.Stop()) }()
	if err := b.l7Rounds(ctx, dir); err != nil {
		return err
	}
	return b.l7Sizes(ctx, dir)
}

func (b bench) l7Rounds(ctx context.Context, dir string) (err error) {
	subjects := b.l7Subjects()
	procs := make([]running, len(subjects))
	defer func() {
		for _, p := range procs {
			if p.stop != nil {
				err = errors.Join(err, p.stop())
			}
		}
	}()
	for i, s := range subjects {
		if s.start == nil {
			continue
		}
		s.shape.Origin, s.shape.First = l7Origin, l7First+i
		own := filepath.Join(dir, fmt.Sprint(i))
		if err := os.Mkdir(own, 0o700); err != nil {
			return err
		}
		if procs[i], err = s.start(ctx, own, s.shape); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	rows := map[string]*l7Row{}
	for round := range b.pairs {
		for i := range subjects {
			i = (i + round) % len(subjects)
			if rows[subjects[i].name] == nil {
				rows[subjects[i].name] = &l7Row{}
			}
			if err := b.l7Measure(ctx, procs[i], rows[subjects[i].name]); err != nil {
				return fmt.Errorf("%s: %w", subjects[i].name, err)
			}
		}
	}
	printL7(subjects, rows)
	return nil
}

// l7Row is what was measured of a subject, round by round. Times are microseconds.
type l7Row struct {
	rate, cpu, p50, p99, late []float64
	// requests that were answered, and lines of the log that came.
	requests, lines int
}

// l7Measure takes one round of a subject: warm, as fast as may be, and at a rate.
func (b bench) l7Measure(ctx context.Context, p running, row *l7Row) error {
	address := l7Origin
	cpu, lines := func() (time.Duration, error) { return 0, nil }, func() uint64 { return 0 }
	if p.Process != nil {
		address, cpu = p.Address, p.CPU
	}
	if p.lines != nil {
		lines = p.lines
	}
	came := lines()
	var loads [3]httpload.Result
	var used time.Duration
	for i, load := range []struct {
		rate float64
		over time.Duration
	}{{0, b.duration / 2}, {0, b.duration * 3 / 2}, {l7Rate, 3 * b.duration}} {
		before, err := cpu()
		if err != nil {
			return err
		}
		if loads[i], err = b.l7bench().Load(ctx, address, l7Connections, load.rate, load.over); err != nil {
			return err
		}
		after, err := cpu()
		if err != nil {
			return err
		}
		if i == 1 {
			used = after - before
		}
		if loads[i].Failed > 0 {
			return fmt.Errorf("%d requests failed: %s", loads[i].Failed, loads[i].First)
		}
		row.requests += loads[i].Requests
	}
	full, paced := loads[1], loads[2]
	row.rate = append(row.rate, full.Rate())
	row.cpu = append(row.cpu, micros(used)/float64(full.Requests))
	row.p50, row.p99, row.late = append(row.p50, micros(paced.Median)), append(row.p99, micros(paced.P99)), append(row.late, micros(paced.Late))
	row.lines += int(lines() - came)
	return nil
}

func micros(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1000 }
