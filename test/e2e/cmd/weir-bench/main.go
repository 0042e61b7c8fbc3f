// SPDX-License-Identifier: Apache-2.0

// Command weir-bench measures the mesh against plain kernel routing, in interleaved pairs: docs/BENCHMARKS.md, part (a).
// It needs root and the binaries in bin/.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/weirmesh/weir/test/e2e/plain"
)

const pods = `
apiVersion: v1
kind: Pod
metadata: {name: a, labels: {app: a}, annotations: {weir.dev/ip-addresses: "10.244.1.101,fd00:10:244:1::101"}}
spec:
  nodeName: node1
  containers: [{name: main, image: none, command: [e2e-traffic, measure-serve], readinessProbe: {exec: {command: [e2e-traffic, ready, "7100"]}, periodSeconds: 1}}]
---
apiVersion: v1
kind: Pod
metadata: {name: b, labels: {app: b}, annotations: {weir.dev/ip-addresses: "10.244.1.102,fd00:10:244:1::102"}}
spec:
  nodeName: node1
  containers: [{name: main, image: none, command: [e2e-traffic, measure-serve], readinessProbe: {exec: {command: [e2e-traffic, ready, "7100"]}, periodSeconds: 1}}]
---
apiVersion: v1
kind: Pod
metadata: {name: c, labels: {app: c}, annotations: {weir.dev/ip-addresses: "10.244.2.103,fd00:10:244:2::103"}}
spec:
  nodeName: node2
  containers: [{name: main, image: none, command: [e2e-traffic, measure-serve], readinessProbe: {exec: {command: [e2e-traffic, ready, "7100"]}, periodSeconds: 1}}]
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "weir-bench:", err)
		os.Exit(1)
	}
}

// bench is what all parts of the run share.
type bench struct {
	bin, manifests string
	pairs          int
	duration       time.Duration
}

func run(ctx context.Context) error {
	if len(os.Args) > 1 && os.Args[1] == "follow" { // the client of the flow path, in a process of its own
		return follow(ctx, os.Args[2])
	}
	bin := flag.String("bin", "bin", "folder of the binaries")
	parts := flag.String("parts", "path,flows,policy,services,l7,noisy,dns,mesh", "what to measure, comma separated")
	serviceCounts := flag.String("services", "10,1000,10000", "numbers of services to try")
	b := bench{}
	flag.IntVar(&b.pairs, "pairs", 10, "interleaved pairs of each measurement")
	flag.DurationVar(&b.duration, "duration", time.Second, "length of one measurement of the packet path; those above L4 take half to three times as long")
	flowTime := flag.Duration("flow-duration", 30*time.Second, "length of one run of the flow path")
	rates := flag.String("rates", "340,1700,2400", "connections a second to try on the flow path, rising")
	flag.Parse()

	var err error
	if b.bin, err = filepath.Abs(*bin); err != nil {
		return err
	}
	if err := b.built(); err != nil {
		return err
	}
	if b.manifests, err = os.MkdirTemp("", "weir-bench"); err != nil {
		return err
	}
	defer os.RemoveAll(b.manifests)
	if err := os.WriteFile(filepath.Join(b.manifests, "pods.yaml"), []byte(pods), 0o600); err != nil {
		return err
	}
	kinds := map[string]func() error{
		"path": func() error { return b.path(ctx) }, "flows": func() error { return b.flows(ctx, *flowTime, *rates) },
		"policy": func() error { return b.policy(ctx) }, "services": func() error { return b.services(ctx, *serviceCounts) },
		"l7": func() error { return b.l7(ctx) }, "noisy": func() error { return b.noisyPart(ctx) },
		"dns": func() error { return b.dns(ctx) }, "mesh": func() error { return b.mesh(ctx) },
	}
	asked := strings.Split(*parts, ",")
	for _, part := range asked {
		if kinds[part] == nil {
			return fmt.Errorf("part %q: want some of path, flows, policy, services, l7, noisy, dns and mesh", part)
		}
	}
	var errs []error
	// A part that fails, for want of a tool say, does not keep the others from being measured.
	for _, part := range asked {
		begun := time.Now()
		err := kinds[part]()
		if ctx.Err() != nil {
			return errors.Join(err, ctx.Err())
		}
		if err != nil {
			fmt.Printf("\npart %s failed: %v\n", part, err)
			errs = append(errs, fmt.Errorf("part %s: %w", part, err))
		}
		fmt.Printf("\n(part %s: %s)\n", part, time.Since(begun).Round(time.Second))
	}
	return errors.Join(errs...)
}

// built says which binaries are missing.
func (b bench) built() error {
	var errs []error
	for _, name := range []string{"weir", "weir-lab", "weir-proxy", "e2e-traffic", "coredns"} {
		if _, err := os.Stat(filepath.Join(b.bin, name)); err != nil {
			errs = append(errs, fmt.Errorf("%w (`make build` makes it)", err))
		}
	}
	return errors.Join(errs...)
}

func (b bench) tool() string { return filepath.Join(b.bin, "e2e-traffic") }

// lab starts a lab of separate processes; the function it returns ends it.
func (b bench) lab(ctx context.Context, server string) (name string, down func(), err error) {
	name = fmt.Sprintf("b%06x", rand.Uint32()&0xffffff)
	weirLab := filepath.Join(b.bin, "weir-lab")
	down = func() { _ = exec.Command(weirLab, "down", "--name", name).Run() }
	up := exec.CommandContext(ctx, weirLab, "up", "-d", "--separate", "--name", name, "--manifests", b.manifests, "--observer-listen", server)
	up.Stderr = os.Stderr
	if err := up.Run(); err != nil {
		down()
		return "", nil, fmt.Errorf("weir lab up: %w", err)
	}
	return name, down, nil
}

func (b bench) exec(ctx context.Context, lab, pod string, args ...string) ([]byte, error) {
	return exec.CommandContext(ctx, filepath.Join(b.bin, "weir-lab"), append([]string{"exec", "--name", lab, pod, "--"}, args...)...).Output()
}

// path is part (a): the packet path.
func (b bench) path(ctx context.Context) (err error) {
	lab, down, err := b.lab(ctx, "127.0.0.1:14245")
	if err != nil {
		return err
	}
	defer down()
	base, err := plain.New(fmt.Sprintf("plain-%06x-", rand.Uint32()&0xffffff))
	if err != nil {
		return fmt.Errorf("baseline: %w", err)
	}
	defer func() { err = errors.Join(err, base.Close()) }()
	for pod := range plain.Pods {
		if err := base.Start(pod, b.tool(), "measure-serve"); err != nil {
			return err
		}
	}
	mesh := func(what, to string) (float64, error) {
		return number(b.exec(ctx, lab, "default/a", b.tool(), "measure", what, to, b.duration.String()))
	}
	bare := func(what, to string) (float64, error) {
		out, err := base.Exec(ctx, "a", b.tool(), "measure", what, to, b.duration.String())
		return number([]byte(out), err)
	}
	fmt.Println("pod to pod, flows on, against the same namespaces joined by plain kernel routing without eBPF")
	fmt.Printf("%-14s %-12s %14s %14s   %s\n", "what", "path", "weir", "plain", "weir / plain: median (middle 80 %)")
	for _, path := range []struct{ name, mesh, bare string }{
		{"same node", "10.244.1.102", plain.Pods["b"]},
		{"across nodes", "10.244.2.103", plain.Pods["c"]},
	} {
		for _, m := range []struct{ what, unit string }{{"rtt", "us"}, {"throughput", "MB/s"}, {"connections", "/s"}} {
			s, err := b.interleaved(func() (float64, error) { return mesh(m.what, path.mesh) }, func() (float64, error) { return bare(m.what, path.bare) })
			if err != nil {
				return fmt.Errorf("%s, %s: %w", m.what, path.name, err)
			}
			fmt.Printf("%-14s %-12s %14s %14s   %s\n", m.what, path.name, fmt.Sprintf("%.1f %s", s.Subject, m.unit), fmt.Sprintf("%.1f %s", s.Baseline, m.unit), s)
		}
	}
	return nil
}

func number(out []byte, err error) (float64, error) {
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			return 0, fmt.Errorf("%w: %s", err, exit.Stderr)
		}
		return 0, err
	}
	return strconv.ParseFloat(strings.TrimSpace(string(out)), 64)
}
