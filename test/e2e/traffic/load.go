// SPDX-License-Identifier: Apache-2.0

package traffic

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// Load makes rate short TCP connections a second to the echo server for d, each with one request, one answer and an orderly end. It returns
// how many it made; a machine too slow for the rate makes fewer.
func Load(ctx context.Context, to netip.Addr, rate int, d time.Duration) (int, error) {
	// Closed connections' ports come back after a second: at high rates the range would run out.
	if err := os.WriteFile("/proc/sys/net/ipv4/tcp_tw_reuse", []byte("1"), 0); err != nil {
		return 0, fmt.Errorf("load: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	const workers = 64
	due := make(chan struct{}, workers)
	var (
		wg      sync.WaitGroup
		made    atomic.Int64
		failed  atomic.Int64
		lastErr atomic.Value
	)
	for range workers {
		wg.Go(func() {
			for range due {
				if err := one(to); err != nil {
					failed.Add(1)
					lastErr.Store(err)
					continue
				}
				made.Add(1)
			}
		})
	}
	start := time.Now()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	sent := 0
	for ctx.Err() == nil {
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
		for want := int(time.Since(start).Seconds() * float64(rate)); sent < want && ctx.Err() == nil; sent++ {
			select {
			case due <- struct{}{}:
			case <-ctx.Done():
			}
		}
	}
	close(due)
	wg.Wait()
	if n := failed.Load(); n > 0 {
		return int(made.Load()), fmt.Errorf("load: %d connections failed, the last: %v", n, lastErr.Load())
	}
	return int(made.Load()), nil
}

func one(to netip.Addr) error {
	c, err := dialMeasure(to, echoPort)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	buf := make([]byte, 200)
	if _, err := c.Write(buf); err != nil {
		return err
	}
	_, err = c.Read(buf)
	return err
}
