// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/weirmesh/weir/test/e2e/httpload"
	"github.com/weirmesh/weir/test/e2e/l7bench"
	"github.com/weirmesh/weir/test/e2e/ratio"
)

// sized are the proxies of which memory and listeners are measured.
func (b bench) sized() []subject {
	return []subject{{name: "haproxy", start: b.haproxy}, {name: "nginx", start: b.nginx}, {name: "weir-proxy", start: b.weirProxy}}
}

// l7Sizes measures memory with idle connections, listeners and routes, once, and how long a further listener takes.
func (b bench) l7Sizes(ctx context.Context, dir string) error {
	fmt.Println("\nresident memory, MiB")
	t := table()
	fmt.Fprintln(t, "proxy\tstarted\t1,000 idle connections\t1,000 listeners\t5,000 routes\t")
	for _, s := range b.sized() {
		fmt.Fprintf(t, "%s\t", s.name)
		for _, size := range []struct{ listeners, routes, idle int }{{1, 0, 0}, {1, 0, 1000}, {1000, 0, 0}, {1, 5000, 0}} {
			s.shape = l7bench.Shape{Namespace: "bench", Origin: l7Origin, First: l7Sized, Listeners: size.listeners, Routes: size.routes}
			m, err := b.l7Memory(ctx, dir, s, size.idle)
			if err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
			fmt.Fprintf(t, "%.1f\t", float64(m)/(1<<20))
		}
		fmt.Fprintln(t)
	}
	_ = t.Flush() // standard output
	fmt.Printf("\none listener more than 1,000 or some: ms from its configuration until it answers, median of %d (middle 80 %%)\n", b.pairs)
	t = table()
	for _, s := range b.sized() {
		s.shape = l7bench.Shape{Namespace: "bench", Origin: l7Origin, First: l7Sized, Listeners: 1000, Rule: everything, Reloads: true}
		times, err := b.l7Add(ctx, dir, s)
		if err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		took := ratio.SpreadOf(times)
		fmt.Fprintf(t, "%s\t%.1f (%.1f..%.1f)\t\n", s.name, took.Median, took.Low, took.High)
	}
	return t.Flush()
}

func (b bench) l7Memory(ctx context.Context, dir string, s subject, idle int) (memory int, err error) {
	dir, err = os.MkdirTemp(dir, "size")
	if err != nil {
		return 0, err
	}
	p, err := s.start(ctx, dir, s.shape)
	if err != nil {
		return 0, err
	}
	defer func() { _ = p.stop() }()
	if err := answers(ctx, l7Sized+s.shape.Listeners-1); err != nil {
		return 0, err
	}
	if _, err := httpload.Load(ctx, p.Address, 4, 0, b.duration/5, "/route/4999/x"); err != nil {
		return 0, err
	}
	closeAll, err := httpload.Idle(ctx, p.Address, idle)
	defer closeAll()
	if err != nil {
		return 0, err
	}
	return p.Memory()
}

// answers waits until a port does.
func answers(ctx context.Context, port int) error {
	address := net.JoinHostPort("127.0.0.1", fmt.Sprint(port))
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		closeAll, err := httpload.Idle(ctx, address, 1)
		closeAll()
		if err == nil || time.Now().After(deadline) {
			return err
		}
	}
}

// l7Add measures how long a further listener takes, again and again, in milliseconds.
func (b bench) l7Add(ctx context.Context, dir string, s subject) (times []float64, err error) {
	dir, err = os.MkdirTemp(dir, "add")
	if err != nil {
		return nil, err
	}
	p, err := s.start(ctx, dir, s.shape)
	if err != nil {
		return nil, err
	}
	defer func() { _ = p.stop() }()
	if err := answers(ctx, l7Sized+s.shape.Listeners-1); err != nil {
		return nil, err
	}
	for range b.pairs {
		s.shape.Listeners++
		begun := time.Now()
		if err := p.configure(ctx, s.shape); err != nil {
			return nil, err
		}
		if err := answers(ctx, l7Sized+s.shape.Listeners-1); err != nil {
			return nil, err
		}
		times = append(times, micros(time.Since(begun))/1000)
	}
	return times, nil
}
