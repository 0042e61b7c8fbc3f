// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/weirmesh/weir/test/e2e/l7bench"
	"github.com/weirmesh/weir/test/e2e/netns"
	"github.com/weirmesh/weir/test/e2e/plain"
	"github.com/weirmesh/weir/test/e2e/ratio"
)

// serviceTarget is a service whose backend is pod c, with the servers' own ports.
const serviceTarget = "10.96.128.1"

func serviceManifest(name, address, selector string) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Service
metadata: {name: %s}
spec: {clusterIP: %s, selector: {app: %s}, ports: [{name: c, port: 7102}, {name: u, port: 7100, protocol: UDP}]}
---
`, name, address, selector)
}

// services is the cost of a ClusterIP, and whether it grows with their number.
func (b bench) services(ctx context.Context, counts string) error {
	if err := l7bench.Require("nft", "iptables-legacy-restore"); err != nil {
		return err
	}
	fmt.Println("TCP connections a second from a pod through a ClusterIP to another node, and UDP packets a second balanced packet by packet, against rules of kube-proxy's kind in plain namespaces")
	fmt.Printf("%-10s %-12s %-22s %12s %12s   %s\n", "services", "what", "against", "weir", "baseline", "weir / baseline: median (middle 80 %)")
	for text := range strings.SplitSeq(counts, ",") {
		n, err := strconv.Atoi(text)
		if err != nil || n < 1 {
			return fmt.Errorf("services %q: want numbers above 0", counts)
		}
		if err := b.servicesOf(ctx, n); err != nil {
			return fmt.Errorf("%d services: %w", n, err)
		}
	}
	return nil
}

func (b bench) servicesOf(ctx context.Context, n int) (err error) {
	var all strings.Builder
	all.WriteString("---\n")
	all.WriteString(serviceManifest("target", serviceTarget, "c"))
	for i := range n - 1 {
		all.WriteString(serviceManifest(fmt.Sprintf("other-%d", i), fmt.Sprintf("10.96.%d.%d", i/250, 2+i%250), "c"))
	}
	file := filepath.Join(b.manifests, "services.yaml")
	if err := os.WriteFile(file, []byte(all.String()), 0o600); err != nil {
		return err
	}
	defer os.Remove(file)
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
	if err := base.Start("c", b.tool(), "measure-serve"); err != nil {
		return err
	}
	mesh := func(what string) (float64, error) {
		if what == "packets" { // past the socket hooks: by a process that is in the pod's namespace and not in its cgroup
			return number(outside(ctx, "/run/netns/weir-"+lab+"-default.a", b.tool(), "measure", what, serviceTarget, b.duration.String()))
		}
		return number(b.exec(ctx, lab, "default/a", b.tool(), "measure", what, serviceTarget, b.duration.String()))
	}
	bare := func(what string) (float64, error) {
		out, err := base.Exec(ctx, "a", b.tool(), "measure", what, plain.Target.String(), b.duration.String())
		return number([]byte(out), err)
	}
	// The agents may still be at work on so many services.
	for end := time.Now().Add(time.Minute); ; {
		if _, err = mesh("connections"); err == nil || time.Now().After(end) {
			break
		}
	}
	if err != nil {
		return err
	}
	for _, against := range []struct {
		name  string
		rules func(int) error
		what  []string
	}{
		{"kube-proxy iptables", base.IPTables, []string{"connections"}},
		{"kube-proxy nftables", base.NFTables, []string{"connections", "packets"}},
	} {
		if err := against.rules(n); err != nil {
			return err
		}
		for _, what := range against.what {
			s, err := b.interleaved(func() (float64, error) { return mesh(what) }, func() (float64, error) { return bare(what) })
			if err != nil {
				return err
			}
			fmt.Printf("%-10d %-12s %-22s %12.0f %12.0f   %s\n", n, what, against.name, s.Subject, s.Baseline, s)
		}
		if err := base.Flush(); err != nil {
			return err
		}
	}
	return nil
}

// interleaved takes pairs of measurements; who goes first alternates.
func (b bench) interleaved(subject, baseline func() (float64, error)) (ratio.Summary, error) {
	var p ratio.Pairs
	for i := range b.pairs {
		var x, y float64
		var xerr, yerr error
		if i%2 == 0 {
			x, xerr = subject()
			y, yerr = baseline()
		} else {
			y, yerr = baseline()
			x, xerr = subject()
		}
		if err := errors.Join(xerr, yerr); err != nil {
			return ratio.Summary{}, err
		}
		p.Add(x, y)
	}
	return p.Summary(), nil
}

// outside runs a command in a network namespace and returns its standard output.
func outside(ctx context.Context, path string, args ...string) (out []byte, err error) {
	err = netns.Do(path, func() error {
		out, err = exec.CommandContext(ctx, args[0], args[1:]...).Output()
		return err
	})
	return out, err
}
