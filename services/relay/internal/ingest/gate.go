// SPDX-License-Identifier: Apache-2.0

package ingest

import (
	"context"
	"errors"
	"sync"
	"time"
)

// ErrClosed says that the bus does not take batches now.
var ErrClosed = errors.New("nats is away")

// Gate is open while the bus takes batches. It begins closed.
type Gate struct {
	mu     sync.Mutex
	opened chan struct{} // closed while the gate is open
	open   bool
}

// NewGate makes a closed gate.
func NewGate() *Gate { return &Gate{opened: make(chan struct{})} }

// Set opens or closes the gate.
func (g *Gate) Set(open bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if open == g.open {
		return
	}
	g.open = open
	if open {
		close(g.opened)
	} else {
		g.opened = make(chan struct{})
	}
}

// Wait returns when the gate is open, or ErrClosed after the given time.
func (g *Gate) Wait(ctx context.Context, atMost time.Duration) error {
	g.mu.Lock()
	opened := g.opened
	g.mu.Unlock()
	select {
	case <-opened:
		return nil
	default:
	}
	timer := time.NewTimer(atMost)
	defer timer.Stop()
	select {
	case <-opened:
		return nil
	case <-timer.C:
		return ErrClosed
	case <-ctx.Done():
		return ctx.Err()
	}
}
