// SPDX-License-Identifier: Apache-2.0

// Command e2e-traffic is the client and the server of the end-to-end tests' random traffic.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/weirmesh/weir/test/e2e/httpload"
	"github.com/weirmesh/weir/test/e2e/names"
	"github.com/weirmesh/weir/test/e2e/traffic"
	"github.com/weirmesh/weir/test/e2e/web"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) > 0 && args[0] == "serve" {
		return traffic.Serve(ctx)
	}
	if len(args) > 1 && args[0] == "http" {
		return web.Serve(ctx, args[1:]...)
	}
	if len(args) == 2 && args[0] == "origin" {
		return httpload.ServeOrigin(ctx, args[1])
	}
	if len(args) == 2 && args[0] == "sink" {
		return httpload.ServeSink(ctx, args[1])
	}
	if len(args) == 3 && args[0] == "http-flood" {
		return flood(ctx, args[1], args[2])
	}
	if len(args) > 4 && (args[0] == "http-load" || args[0] == "names-load") {
		return loadL7(ctx, args[0], args[1:])
	}
	if len(args) > 1 && args[0] == "names" {
		return names.Serve(ctx, args[1:]...)
	}
	if len(args) == 3 {
		switch args[0] {
		case "spoof", "orphan-fragments", "fill":
			return crafted(args[0], args[1], args[2])
		}
	}
	if len(args) == 2 && args[0] == "ready" {
		return traffic.Ready(args[1])
	}
	if len(args) > 0 && args[0] == "measure-serve" {
		return traffic.MeasureServe(ctx)
	}
	if len(args) == 4 && args[0] == "measure" {
		return measure(args[1], args[2], args[3])
	}
	if len(args) == 4 && args[0] == "load" {
		return load(ctx, args[1], args[2], args[3])
	}
	if len(args) > 1 {
		switch args[0] {
		case "ask", "path-mtu", "transfer", "ping":
			return probe(ctx, args[0], args[1:])
		}
	}
	if len(args) > 0 && args[0] == "ask-many" {
		return askMany(ctx, args[1:])
	}
	if len(args) == 2 && args[0] == "offload-off" {
		return traffic.OffloadOff(args[1])
	}
	if len(args) == 0 || args[0] != "run" {
		return errors.New("usage: e2e-traffic serve | http PORT... | origin|sink ADDRESS:PORT | http-flood ADDRESS:PORT DURATION | http-load ADDRESS:PORT CONNECTIONS RATE DURATION | names-load ADDRESS:PORT NAME SOCKETS RATE DURATION | names NAME=ADDRESS/TTL... | ready PORT | run [flags] | offload-off INTERFACE | ask-many [flags] ADDRESS:PORT | spoof|orphan-fragments|fill COUNT ADDRESS | measure-serve | load ADDRESS RATE DURATION | measure rtt|throughput|connections|packets ADDRESS DURATION | " + probeUsage)
	}
	args = args[1:]
	fs := flag.NewFlagSet("e2e-traffic", flag.ContinueOnError)
	seed := fs.Uint64("seed", 1, "seed of the random sequence")
	count := fs.Int("count", 100, "connections to make")
	parallel := fs.Int("parallel", 4, "connections at a time")
	over := fs.Duration("over", 0, "time to spread the connections over")
	targets := fs.String("targets", "", "addresses, comma separated")
	unanswered := fs.String("unanswered", "", "addresses that nobody has, comma separated")
	if err := fs.Parse(args); err != nil {
		return err
	}
	cfg := traffic.Config{Seed: *seed, Count: *count, Parallel: *parallel, Over: *over}
	var err error
	if cfg.Targets, err = addresses(*targets); err != nil {
		return err
	}
	if cfg.Unanswered, err = addresses(*unanswered); err != nil {
		return err
	}
	made, err := traffic.Run(ctx, cfg)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(made)
}

// loadL7 is http-load ADDRESS:PORT CONNECTIONS RATE DURATION, or names-load ADDRESS:PORT NAME SOCKETS RATE DURATION.
func loadL7(ctx context.Context, what string, args []string) error {
	to, err := netip.ParseAddrPort(args[0])
	if err != nil {
		return fmt.Errorf("address %q: %w", args[0], err)
	}
	name := ""
	if what == "names-load" {
		name, args = args[1], args[1:]
	}
	if len(args) != 4 {
		return fmt.Errorf("%s: expected how many, how often and how long", what)
	}
	parallel, err := strconv.Atoi(args[1])
	if err != nil {
		return fmt.Errorf("count %q: %w", args[1], err)
	}
	rate, err := strconv.ParseFloat(args[2], 64)
	if err != nil {
		return fmt.Errorf("rate %q: %w", args[2], err)
	}
	over, err := time.ParseDuration(args[3])
	if err != nil {
		return fmt.Errorf("duration %q: %w", args[3], err)
	}
	if what == "names-load" {
		r, err := names.Load(to, name, parallel, rate, over)
		if err != nil {
			return err
		}
		return json.NewEncoder(os.Stdout).Encode(r)
	}
	r, err := httpload.Load(ctx, to.String(), parallel, rate, over, "/")
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(r)
}

func flood(ctx context.Context, address, d string) error {
	over, err := time.ParseDuration(d)
	if err != nil {
		return fmt.Errorf("duration %q: %w", d, err)
	}
	return json.NewEncoder(os.Stdout).Encode(httpload.Flood(ctx, address, over))
}

func askMany(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("e2e-traffic ask-many", flag.ContinueOnError)
	network := fs.String("network", "tcp", "tcp, udp or udp-unconnected")
	over := fs.Duration("over", 10*time.Second, "time to ask")
	count := fs.Int("count", 0, "questions to ask; 0 = as many as fit")
	limit := fs.Duration("limit", 5*time.Second, "time for one question")
	parallel := fs.Int("parallel", 1, "questions at a time")
	if err := fs.Parse(args); err != nil {
		return err
	}
	to, err := netip.ParseAddrPort(fs.Arg(0))
	if err != nil {
		return fmt.Errorf("address %q: %w", fs.Arg(0), err)
	}
	return json.NewEncoder(os.Stdout).Encode(traffic.AskMany(ctx, *network, to, *over, *count, *limit, *parallel))
}

func addresses(list string) ([]netip.Addr, error) {
	var out []netip.Addr
	for s := range strings.SplitSeq(list, ",") {
		if s == "" {
			continue
		}
		a, err := netip.ParseAddr(s)
		if err != nil {
			return nil, fmt.Errorf("address %q: %w", s, err)
		}
		out = append(out, a)
	}
	return out, nil
}

func measure(what, to, d string) error {
	addr, err := netip.ParseAddr(to)
	if err != nil {
		return fmt.Errorf("address %q: %w", to, err)
	}
	duration, err := time.ParseDuration(d)
	if err != nil {
		return fmt.Errorf("duration %q: %w", d, err)
	}
	v, err := traffic.Measure(what, addr, duration)
	if err != nil {
		return err
	}
	_, err = fmt.Println(v)
	return err
}

func load(ctx context.Context, to, rate, d string) error {
	addr, err := netip.ParseAddr(to)
	if err != nil {
		return fmt.Errorf("address %q: %w", to, err)
	}
	n, err := strconv.Atoi(rate)
	if err != nil || n <= 0 {
		return fmt.Errorf("rate %q: want a number above 0", rate)
	}
	duration, err := time.ParseDuration(d)
	if err != nil {
		return fmt.Errorf("duration %q: %w", d, err)
	}
	made, err := traffic.Load(ctx, addr, n, duration)
	fmt.Println(made)
	return err
}

func crafted(what, count, to string) error {
	n, err := strconv.Atoi(count)
	if err != nil || n <= 0 {
		return fmt.Errorf("count %q: want a number above 0", count)
	}
	addr, err := netip.ParseAddr(to)
	if err != nil {
		return fmt.Errorf("address %q: %w", to, err)
	}
	switch what {
	case "spoof":
		return traffic.Spoof(n, addr)
	case "orphan-fragments":
		return traffic.OrphanFragments(n, addr)
	}
	_, err = fmt.Println(traffic.Fill(n, addr))
	return err
}
