// SPDX-License-Identifier: Apache-2.0

package alarm

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// rig keeps the lock, and when the alarm was due.
type rig struct {
	mu    sync.Mutex
	a     Alarm
	begin time.Time
	calls int
	due   []time.Duration
}

func newRig() *rig {
	r := &rig{begin: time.Now()}
	r.a.Do = func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.calls++
		if r.a.Due(time.Now()) {
			r.due = append(r.due, time.Since(r.begin))
		}
	}
	return r
}

func (r *rig) set(after time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	at := time.Time{}
	if after > 0 {
		at = time.Now().Add(after)
	}
	r.a.Set(at, time.Now())
}

func (r *rig) check(t *testing.T, calls int, due ...time.Duration) {
	t.Helper()
	synctest.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.calls != calls {
		t.Errorf("%d calls, want %d", r.calls, calls)
	}
	if len(r.due) != len(due) {
		t.Fatalf("due at %v, want %v", r.due, due)
	}
	for i := range due {
		if r.due[i] != due[i] {
			t.Errorf("due at %v, want %v", r.due, due)
		}
	}
}

// TestSetAnew: what is put off a thousand times costs one call, and is due when it was last said to be.
func TestSetAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig()
		for range 1000 {
			r.set(time.Second)
			time.Sleep(time.Millisecond)
		}
		time.Sleep(time.Hour)
		r.check(t, 2, 999*time.Millisecond+time.Second)
	})
}

func TestSooner(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig()
		r.set(time.Hour)
		r.set(time.Second)
		time.Sleep(2 * time.Hour)
		r.check(t, 1, time.Second)
		r.set(time.Second)
		time.Sleep(time.Minute)
		r.check(t, 2, time.Second, 2*time.Hour+time.Second)
	})
}

func TestNever(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig()
		r.set(time.Second)
		r.set(0)
		time.Sleep(time.Minute)
		r.check(t, 1)
		r.set(time.Second)
		r.mu.Lock()
		r.a.Stop()
		r.mu.Unlock()
		time.Sleep(time.Minute)
		r.check(t, 1)
	})
}
