// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/http"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Metrics are samples by name with labels, as a scrape shows them.
type Metrics map[string]float64

// Sum adds the samples of a metric whose labels contain text.
func (m Metrics) Sum(name, text string) (sum float64) {
	for k, v := range m {
		if base, labels, _ := strings.Cut(k, "{"); base == name && strings.Contains(labels, text) {
			sum += v
		}
	}
	return sum
}

// Metrics scrapes a port on the loopback of a node.
func (l *Lab) Metrics(ctx context.Context, node string, port int) (Metrics, error) {
	var netns string
	for _, n := range l.State(ctx).Nodes {
		if n.Name == node {
			netns = n.Netns
		}
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		return dialIn(ctx, netns, network, addr)
	}}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d/metrics", port), nil)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("metrics of %s: %w", node, err)
	}
	defer resp.Body.Close()
	m := Metrics{}
	for s := bufio.NewScanner(resp.Body); s.Scan(); {
		name, value, ok := strings.Cut(s.Text(), " ")
		if i := strings.LastIndexByte(s.Text(), ' '); ok && i > 0 {
			name, value = s.Text()[:i], s.Text()[i+1:]
		}
		if v, err := strconv.ParseFloat(value, 64); err == nil && !strings.HasPrefix(name, "#") {
			m[name] = v
		}
	}
	return m, nil
}

// dialIn dials from inside a network namespace.
func dialIn(ctx context.Context, netns, network, addr string) (conn net.Conn, err error) {
	err = inNetns(ctx, netns, func(ctx context.Context) (err error) {
		var d net.Dialer
		conn, err = d.DialContext(ctx, network, addr)
		return err
	})
	return conn, err
}

// inNetns calls fn on a thread inside a network namespace, given by its path.
func inNetns(ctx context.Context, netns string, fn func(context.Context) error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread dies with its foreign namespace
		fd, err := unix.Open(netns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			done <- err
			return
		}
		defer unix.Close(fd)
		if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		done <- fn(ctx)
	}()
	return <-done
}
