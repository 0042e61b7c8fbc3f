// SPDX-License-Identifier: Apache-2.0

// Package pace makes who builds a configuration give way to who serves.
//
// The proxy serves on few threads, often one. Go lets a goroutine run for 10 ms, and looks for what the network has ready only when no goroutine is runnable: one
// that compiles without a pause makes every connection wait, and runtime.Gosched does not help, for what came over the network is not runnable yet. A
// goroutine that sleeps does help: then the scheduler looks.
package pace

import "time"

const (
	// slice is how long is worked at a time.
	slice = 500 * time.Microsecond
	// longest is how long a pause is at most, after a step that could not be divided or while the machine did other things.
	longest = 10 * time.Millisecond
)

// Pace divides the time of one goroutine into work and pauses that are as long. It belongs to that goroutine.
type Pace struct {
	serves func() bool
	now    func() time.Time
	sleep  func(time.Duration)
	since  time.Time // when the work began that no pause has followed
}

// New makes a pace; there are no pauses while nothing is served.
func New(serves func() bool) *Pace { return NewWith(serves, time.Now, time.Sleep) }

// NewWith makes a pace with another clock.
func NewWith(serves func() bool, now func() time.Time, sleep func(time.Duration)) *Pace {
	return &Pace{serves: serves, now: now, sleep: sleep, since: now()}
}

// Begin begins the work after a rest.
func (p *Pace) Begin() { p.since = p.now() }

// Step is called between the steps of the work, which should be short; it pauses when it is time to. It must not be called with a lock that serving takes.
func (p *Pace) Step() {
	worked := p.now().Sub(p.since)
	if worked < slice {
		return
	}
	if p.serves() {
		p.sleep(min(worked, longest))
	}
	p.since = p.now()
}
