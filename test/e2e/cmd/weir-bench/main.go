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
	"github.com/weirmesh/weir/test/e2e/ratio"
)

const pods = `
apiVersion: v1
kind: Pod
metadata: {name: a, annotations: {weir.dev/ip-addresses: "10.244.1.101,fd00:10:244:1::101"}}
spec:
  nodeName: node1
  containers: [{name: main, image: none, command: [e2e-traffic, measure-serve]}]
---
apiVersion: v1
kind: Pod
metadata: {name: b, annotations: {weir.dev/ip-addresses: "10.244.1.102,fd00:10:244:1::102"}}
spec:
  nodeName: node1
  containers: [{name: main, image: none, command: [e2e-traffic, measure-serve]}]
---
apiVersion: v1
kind: Pod
metadata: {name: c, annotations: {weir.dev/ip-addresses: "10.244.2.103,fd00:10:244:2::103"}}
spec:
  nodeName: node2
  containers: [{name: main, image: none, command: [e2e-traffic, measure-serve]}]
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "weir-bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) (err error) {
	bin := flag.String("bin", "bin", "folder of the binaries")
	n := flag.Int("pairs", 10, "interleaved pairs of each measurement")
	d := flag.Duration("duration", time.Second, "length of one measurement")
	flag.Parse()

	dir, err := filepath.Abs(*bin)
	if err != nil {
		return err
	}
	tmp, err := os.MkdirTemp("", "weir-bench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if err := os.WriteFile(filepath.Join(tmp, "pods.yaml"), []byte(pods), 0o600); err != nil {
		return err
	}
	name := fmt.Sprintf("b%06x", rand.Uint32()&0xffffff)
	weirLab := filepath.Join(dir, "weir-lab")
	tool := filepath.Join(dir, "e2e-traffic")

	base, err := plain.New("plain-" + name + "-")
	if err != nil {
		return fmt.Errorf("baseline: %w", err)
	}
	defer func() { err = errors.Join(err, base.Close()) }()
	for pod := range plain.Pods {
		if err := base.Start(pod, tool, "measure-serve"); err != nil {
			return err
		}
	}
	defer func() { _ = exec.Command(weirLab, "down", "--name", name).Run() }()
	up := exec.CommandContext(ctx, weirLab, "up", "-d", "--separate", "--name", name, "--manifests", tmp, "--observer-listen", "127.0.0.1:14245")
	up.Stderr = os.Stderr
	if err := up.Run(); err != nil {
		return fmt.Errorf("weir lab up: %w", err)
	}

	mesh := func(what, to string) (float64, error) {
		out, err := exec.CommandContext(ctx, weirLab, "exec", "--name", name, "default/a", "--", tool, "measure", what, to, d.String()).Output()
		return number(out, err)
	}
	bare := func(what, to string) (float64, error) {
		out, err := base.Exec(ctx, "a", tool, "measure", what, to, d.String())
		return number([]byte(out), err)
	}
	fmt.Println("pod to pod, flows on, against the same namespaces joined by plain kernel routing without eBPF")
	fmt.Printf("%-14s %-12s %14s %14s   %s\n", "what", "path", "weir", "plain", "weir / plain: median (middle 80 %)")
	for _, path := range []struct{ name, mesh, bare string }{
		{"same node", "10.244.1.102", plain.Pods["b"]},
		{"across nodes", "10.244.2.103", plain.Pods["c"]},
	} {
		for _, m := range []struct{ what, unit string }{{"rtt", "us"}, {"throughput", "MB/s"}, {"connections", "/s"}} {
			var p ratio.Pairs
			for i := range *n {
				var w, b float64
				var werr, berr error
				if i%2 == 0 { // who goes first alternates
					w, werr = mesh(m.what, path.mesh)
					b, berr = bare(m.what, path.bare)
				} else {
					b, berr = bare(m.what, path.bare)
					w, werr = mesh(m.what, path.mesh)
				}
				if err := errors.Join(werr, berr); err != nil {
					return fmt.Errorf("%s, %s: %w", m.what, path.name, err)
				}
				p.Add(w, b)
			}
			s := p.Summary()
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
