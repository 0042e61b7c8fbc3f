// SPDX-License-Identifier: Apache-2.0

package ingest

import (
	"context"
	"sync"

	"golang.org/x/sync/semaphore"
)

// flight is what one stream holds of the relay's memory: batches read and not yet answered.
type flight struct {
	all *semaphore.Weighted

	mu     sync.Mutex
	held   int64
	closed bool
}

// acquire waits until the relay has room for n bytes, which is what holds back a fast agent.
func (f *flight) acquire(ctx context.Context, n int64) error {
	if err := f.all.Acquire(ctx, n); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed { // the stream ended while we waited
		f.all.Release(n)
		return context.Canceled
	}
	f.held += n
	return nil
}

func (f *flight) release(n int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return
	}
	f.held -= n
	f.all.Release(n)
}

// close gives back what is held.
func (f *flight) close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	f.all.Release(f.held)
	f.held = 0
}
