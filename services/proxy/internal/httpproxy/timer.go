// SPDX-License-Identifier: Apache-2.0

package httpproxy

import (
	"errors"
	"sync"
	"sync/atomic"
	"time"
)

// Why a stream was ended.
var (
	errTimeout   = errors.New("upstream request timeout")
	errIdle      = errors.New("stream idle timeout")
	errMaxStream = errors.New("longest duration of a stream")
	errRequest   = errors.New("request timeout")
)

// timer watches a stream: one runtime timer for its idleness and all its deadlines. The zero timer watches nothing.
type timer struct {
	idle  time.Duration
	began time.Time
	last  atomic.Int64 // since began
	fire  func(error)

	mu    sync.Mutex
	at    [3]time.Time
	t     *time.Timer
	ended bool
}

// deadlines of a stream.
const (
	deadlineResponse = iota
	deadlineStream
	deadlineRequest
)

var deadlineErrors = [...]error{deadlineResponse: errTimeout, deadlineStream: errMaxStream, deadlineRequest: errRequest}

// start begins to watch; fire is called at most once, in a goroutine of its own.
func (t *timer) start(idle time.Duration, fire func(error)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.idle, t.began, t.fire = idle, time.Now(), fire
	t.arm(t.began)
}

// deadline sets one of the deadlines; 0 = none.
func (t *timer) deadline(which int, after time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	t.at[which] = time.Time{}
	if after > 0 {
		t.at[which] = now.Add(after)
	}
	t.arm(now)
}

// touch notes that something moved.
func (t *timer) touch() {
	if t.idle > 0 {
		t.last.Store(int64(time.Since(t.began)))
	}
}

// arm sets the runtime timer to what comes first. Called with the lock held.
func (t *timer) arm(now time.Time) {
	if t.fire == nil || t.ended {
		return
	}
	next := t.next()
	switch {
	case next.IsZero():
	case t.t == nil:
		t.t = time.AfterFunc(next.Sub(now), t.check)
	default:
		t.t.Reset(next.Sub(now))
	}
}

func (t *timer) next() time.Time {
	var next time.Time
	if t.idle > 0 {
		next = t.began.Add(time.Duration(t.last.Load()) + t.idle)
	}
	for _, at := range t.at {
		if !at.IsZero() && (next.IsZero() || at.Before(next)) {
			next = at
		}
	}
	return next
}

func (t *timer) check() {
	if err := t.due(); err != nil {
		t.fire(err)
	}
}

func (t *timer) due() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ended {
		return nil
	}
	now := time.Now()
	for i, at := range t.at {
		if !at.IsZero() && !now.Before(at) {
			t.ended = true
			return deadlineErrors[i]
		}
	}
	if t.idle > 0 && now.Sub(t.began) >= time.Duration(t.last.Load())+t.idle {
		t.ended = true
		return errIdle
	}
	t.arm(now)
	return nil
}

func (t *timer) stop() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.ended = true
	if t.t != nil {
		t.t.Stop()
	}
}
