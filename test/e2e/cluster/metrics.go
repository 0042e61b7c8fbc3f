// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"strings"

	"github.com/weirmesh/weir/test/e2e/netns"
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
	return l.Scrape(ctx, node, port, "/metrics")
}

// Scrape reads metrics from a path of a port on the loopback of a node.
func (l *Lab) Scrape(ctx context.Context, node string, port int, path string) (Metrics, error) {
	var netns string
	for _, n := range l.State(ctx).Nodes {
		if n.Name == node {
			netns = n.Netns
		}
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		return dialIn(ctx, netns, network, addr)
	}}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d%s", port, path), nil)
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
func dialIn(ctx context.Context, path, network, addr string) (conn net.Conn, err error) {
	err = inNetns(ctx, path, func(ctx context.Context) (err error) {
		var d net.Dialer
		conn, err = d.DialContext(ctx, network, addr)
		return err
	})
	return conn, err
}

// inNetns calls fn on a thread inside a network namespace, given by its path.
func inNetns(ctx context.Context, path string, fn func(context.Context) error) error {
	return netns.Do(path, func() error { return fn(ctx) })
}
