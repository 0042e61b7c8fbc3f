// SPDX-License-Identifier: Apache-2.0

package allocator

import (
	"context"
	"time"
)

// EachKey tells the tests of each key of the bucket: whether it is a claim, and how many entries it
// has as a link.
func (a *Allocator) EachKey(each func(claim bool, entries int)) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	last, err := a.keys.Last(ctx)
	if err != nil {
		panic(err)
	}
	if err := a.waitView(ctx, last); err != nil {
		panic(err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, n := range a.view.numbers {
		each(n.Exists(), 0)
	}
	for _, l := range a.view.links {
		each(false, len(l.Entries))
	}
}

// SetCursor makes the next number tried the one after this.
func (a *Allocator) SetCursor(number uint32) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.cursor = number
}
