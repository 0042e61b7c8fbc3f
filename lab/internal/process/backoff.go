// SPDX-License-Identifier: Apache-2.0

package process

import "time"

// Backoff says how long to wait before a program that ended is started again: longer each time, and short again after it has run for
// a while. The zero value is not ready for use.
type Backoff struct {
	// First is the wait after the first end; it doubles up to Max.
	First, Max time.Duration
	// Forget is how long a program must run for its earlier ends to count no more.
	Forget time.Duration

	next time.Duration
}

// Next returns the wait after a program ended that ran for the given time.
func (b *Backoff) Next(ran time.Duration) time.Duration {
	if b.next == 0 || ran >= b.Forget {
		b.next = b.First
	}
	wait := b.next
	b.next = min(2*b.next, b.Max)
	return wait
}
