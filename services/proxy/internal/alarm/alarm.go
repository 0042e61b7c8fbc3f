// SPDX-License-Identifier: Apache-2.0

// Package alarm has a timer for what is set, and set again, far more often than it goes off: a connection's waits, a stream's deadlines.
package alarm

import "time"

// Alarm leaves the runtime's timer alone while that goes off before the time that is wanted, and sets it anew then. The zero Alarm is not set. Whoever has one
// keeps a lock, which is held in all calls.
type Alarm struct {
	// Do is called in a goroutine of its own, without the lock. It may be early, or late for an alarm that was set anew: Due tells.
	Do    func()
	timer *time.Timer
	// at is when the alarm is due, next when the timer goes off; zero = never.
	at, next time.Time
}

// Set makes the alarm due at a time; the zero time = never.
func (a *Alarm) Set(at, now time.Time) {
	if a.at = at; at.IsZero() || !a.next.IsZero() && !at.Before(a.next) {
		return
	}
	a.start(now)
}

func (a *Alarm) start(now time.Time) {
	a.next = a.at
	if a.timer == nil {
		a.timer = time.AfterFunc(a.at.Sub(now), a.Do)
		return
	}
	a.timer.Reset(a.at.Sub(now))
}

// Due is what Do must ask: it is true once when the alarm's time has come. When it has not, Do will be called again.
func (a *Alarm) Due(now time.Time) bool {
	a.next = time.Time{}
	if a.at.IsZero() {
		return false
	}
	if now.Before(a.at) {
		a.start(now)
		return false
	}
	a.at = time.Time{}
	return true
}

// Stop lets go of the runtime's timer: an alarm that is not needed for long.
func (a *Alarm) Stop() {
	a.at, a.next = time.Time{}, time.Time{}
	if a.timer != nil {
		a.timer.Stop()
	}
}
