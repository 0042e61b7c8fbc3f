// SPDX-License-Identifier: Apache-2.0

// Package httpload makes HTTP requests as fast as they are answered, or at a rate, and serves them as cheaply as may be.
package httpload

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/weirmesh/weir/test/e2e/ratio"
)

// Result of a load. Failed ones are refused, cut off, wrongly answered, and at a rate those that got no answer in time.
type Result struct {
	Requests, Failed int
	Took             time.Duration
	// Median, P99 and Max of the latency, of loads at a rate. It is counted from the moment when a request was due, also when the connection was still
	// taken by the one before, so that a proxy that stands still is charged with every request that was due meanwhile.
	Median, P99, Max time.Duration
	// Late is the 99th percentile of how late a request on a free connection was sent: the generator's own fault, and part of the latencies.
	Late time.Duration
	// First is the first failure.
	First string
}

// Rate is answered requests a second.
func (r Result) Rate() float64 { return float64(r.Requests) / r.Took.Seconds() }

// grace is how long answers are waited for when no more requests are made.
const grace = 5 * time.Second

// Load makes requests on connections for some time: as fast as answers come with rate 0, else that many a second over all connections, whether or not
// those before were answered. One thread does it all, and nothing is allocated between the first request and the last answer.
func Load(ctx context.Context, address string, connections int, rate float64, over time.Duration, path string) (Result, error) {
	l, err := newLoop(ctx, address, connections, path)
	if err != nil {
		return Result{}, fmt.Errorf("load on %s: %w", address, err)
	}
	defer l.close()
	if rate > 0 {
		l.every = time.Duration(float64(time.Second) / rate)
		l.planned = int(over / l.every)
		l.latencies, l.late = make([]time.Duration, 0, l.planned), make([]time.Duration, 0, l.planned)
	}
	if err := l.run(ctx, over); err != nil {
		return Result{}, fmt.Errorf("load on %s: %w", address, err)
	}
	r := Result{Requests: l.answered, Failed: l.failed, Took: l.took}
	if l.failure != nil {
		r.First = l.failure.Error()
	}
	if r.Requests == 0 {
		return r, fmt.Errorf("load on %s: no answer in %s %s", address, over, r.First)
	}
	if rate > 0 {
		slices.Sort(l.latencies)
		slices.Sort(l.late)
		r.Median, r.P99, r.Max = ratio.Quantile(l.latencies, 0.5), ratio.Quantile(l.latencies, 0.99), ratio.Quantile(l.latencies, 1)
		r.Late = ratio.Quantile(l.late, 0.99)
	}
	return r, nil
}
