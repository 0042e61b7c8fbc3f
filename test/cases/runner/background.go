// SPDX-License-Identifier: Apache-2.0

package runner

import (
	"context"
	"fmt"
	"time"

	"github.com/weirmesh/weir/test/cases/format"
)

// background are connections of a case that live beside its expectations: an address that one uses keeps its name.
type background struct{ open []*living }

type living struct {
	on   *format.Connection
	made *made
}

func (b *background) close() {
	for _, l := range b.open {
		l.made.connection.Close()
	}
}

// openBackground opens and closes the connections of a time, in cases with names.
func (g *game) openBackground(ctx context.Context, b *background, at float64) error {
	if !g.c.HasTimes() {
		return nil
	}
	for i := range g.c.Connections {
		k := &g.c.Connections[i]
		if k.OpenAt != at {
			continue
		}
		m, err := g.connection(ctx, k.Flow)
		if err != nil {
			return fmt.Errorf("connections[%d]: %w", i, err)
		}
		b.open = append(b.open, &living{k, m})
		before := g.flows.Mark(m.connection.Tuples())
		message, err := m.connection.Forward()
		if err == nil {
			err = g.awaitAnswer(ctx, message, before)
		}
		if err != nil {
			return fmt.Errorf("connections[%d]: %w", i, err)
		}
	}
	kept := b.open[:0]
	for _, l := range b.open {
		if l.on.CloseAt != nil && *l.on.CloseAt <= at {
			l.made.connection.Close()
			continue
		}
		kept = append(kept, l)
	}
	b.open = kept
	return nil
}

// awaitTime lets the time of a case pass, where names live by it.
func (g *game) awaitTime(ctx context.Context, started time.Time, at float64) error {
	if !g.c.HasTimes() {
		return nil
	}
	wait := time.NewTimer(time.Until(started.Add(time.Duration(at * float64(time.Second)))))
	defer wait.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-wait.C:
		return nil
	}
}
