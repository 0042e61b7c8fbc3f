// SPDX-License-Identifier: Apache-2.0

package httpproxy

import (
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/weirmesh/weir/services/proxy/internal/alarm"
)

// Why a stream was ended.
var (
	errTimeout   = errors.New("upstream request timeout")
	errIdle      = errors.New("stream idle timeout")
	errMaxStream = errors.New("longest duration of a stream")
	errRequest   = errors.New("request timeout")
)

// timer watches a stream: one alarm for its idleness and all its deadlines. One that has been stopped can be started again.
type timer struct {
	idle  time.Duration
	began time.Time
	last  atomic.Int64 // since began
	fire  func(error)

	mu    sync.Mutex
	at    [3]time.Time
	alarm alarm.Alarm
	on    bool
}

// deadlines of a stream.
const (
	deadlineResponse = iota
	deadlineStream
	deadlineRequest
)

var deadlineErrors = [...]error{deadlineResponse: errTimeout, deadlineStream: errMaxStream, deadlineRequest: errRequest}

// start begins to watch; fire is called at most once, in a goroutine of its own, and not after stop has returned.
func (t *timer) start(now time.Time, idle time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.idle, t.began, t.at, t.on = idle, now, [3]time.Time{}, true
	t.last.Store(0)
	if t.alarm.Do == nil {
		t.alarm.Do = t.check
	}
	t.arm(now)
}

// deadline sets one of the deadlines; 0 = none.
func (t *timer) deadline(now time.Time, which int, after time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.at[which] = time.Time{}
	if after > 0 {
		t.at[which] = now.Add(after)
	}
	if t.on {
		t.arm(now)
	}
}

// touch notes that something moved.
func (t *timer) touch() {
	if t.idle > 0 {
		t.last.Store(int64(time.Since(t.began)))
	}
}

// arm sets the alarm to what comes first. Called with the lock held.
func (t *timer) arm(now time.Time) { t.alarm.Set(t.next(), now) }

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
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	if !t.alarm.Due(now) {
		return
	}
	err := t.due(now)
	if err == nil {
		t.arm(now)
		return
	}
	t.on = false
	// With the lock held: whoever stops the timer knows that it does nothing any more.
	t.fire(err)
}

func (t *timer) due(now time.Time) error {
	for i, at := range t.at {
		if !at.IsZero() && !now.Before(at) {
			return deadlineErrors[i]
		}
	}
	if t.idle > 0 && now.Sub(t.began) >= time.Duration(t.last.Load())+t.idle {
		return errIdle
	}
	return nil
}

func (t *timer) stop() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.on = false
	t.alarm.Set(time.Time{}, time.Time{})
}

// release stops for good.
func (t *timer) release() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.on = false
	t.alarm.Stop()
}
