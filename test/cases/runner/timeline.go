// SPDX-License-Identifier: Apache-2.0

package runner

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/weirmesh/weir/test/cases/format"
	"github.com/weirmesh/weir/test/cases/live"
	"github.com/weirmesh/weir/test/cases/probe"
)

// attempt is an expectation and what was made for it.
type attempt struct {
	index int
	e     *format.Expectation
	// on is the connection that the expectation is about, if it is not a new one; opened under the policies of its time.
	on     *format.Connection
	made   *made
	failed error
	// open is the connection, when something is asked on it.
	open net.Conn
}

// openLimit is how long a connection may take to open before its policies are taken to forbid it, if no flow says so.
const openLimit = 5 * time.Second

// timeline plays what happens, in order: times are only compared.
func (g *game) timeline(ctx context.Context, r *Result) error {
	attempts, times, err := g.attempts()
	if err != nil {
		return err
	}
	defer func() {
		for _, a := range attempts {
			if a.made != nil {
				a.made.connection.Close()
			}
		}
	}()
	outcomes := make([]Outcome, len(g.c.Expect))
	for i := range g.c.Expect {
		e := &g.c.Expect[i]
		outcomes[i] = Outcome{What: describe(i, e), Class: NotYet, Want: e.Verdict, Reason: e.Reason}
	}
	applied := false
	started := time.Now()
	var lives background
	defer lives.close()
	for _, at := range times {
		if err := g.awaitTime(ctx, started, at); err != nil {
			return err
		}
		begin := time.Now()
		closeEnded(attempts, at)
		g.edited = false
		if !applied && at >= 0 {
			if err := g.apply(ctx, g.c.Policies); err != nil {
				return err
			}
			applied = true
		}
		for _, change := range g.c.Changes {
			if change.At != at {
				continue
			}
			if err := errors.Join(g.apply(ctx, change.Add), g.remove(ctx, change.Remove)); err != nil {
				return err
			}
		}
		r.phase("policies", begin)
		if len(g.notYet) > 0 {
			break
		}
		begin = time.Now()
		if err := errors.Join(g.resolveAnswers(ctx, at), g.open(ctx, attempts, at), g.openBackground(ctx, &lives, at)); err != nil {
			return err
		}
		r.phase("connections", begin)
		begin = time.Now()
		var wait sync.WaitGroup
		for _, a := range attempts {
			if a.e.At == at {
				wait.Go(func() {
					if a.e.IsLayer7() {
						outcomes[a.index] = g.tryEdited(ctx, a)
						return
					}
					outcomes[a.index] = g.try(ctx, a)
				})
			}
		}
		wait.Wait()
		r.phase("packets", begin)
		if err := g.flows.Err(); err != nil {
			return fmt.Errorf("flows: %w", err)
		}
	}
	r.NotYet = g.notYet
	validated, err := g.validate(ctx)
	if err != nil {
		return err
	}
	r.Outcomes = append(validated, outcomes...)
	return nil
}

// closeEnded closes the connections that have ended by a time.
func closeEnded(attempts []*attempt, at float64) {
	for _, a := range attempts {
		if a.made != nil && a.on.CloseAt != nil && *a.on.CloseAt <= at && a.e.At < at {
			a.made.connection.Close()
			a.made = nil
		}
	}
}

// attempts prepares the expectations, and returns all times at which something happens.
func (g *game) attempts() ([]*attempt, []float64, error) {
	times := []float64{0}
	var all []*attempt
	for i := range g.c.Expect {
		e := &g.c.Expect[i]
		a := &attempt{index: i, e: e}
		times = append(times, e.At)
		reply, err := g.c.Connection(&e.ReplyOf, e)
		if err != nil {
			return nil, nil, err
		}
		related, err := g.c.Connection(&e.RelatedTo, e)
		if err != nil {
			return nil, nil, err
		}
		switch {
		case reply != nil:
			a.on = reply
		case related != nil:
			a.on = related
		case e.Established:
			a.on = g.c.Live(e)
		}
		if a.on != nil {
			times = append(times, a.on.OpenAt)
		}
		all = append(all, a)
	}
	for _, c := range g.c.Changes {
		times = append(times, c.At)
	}
	return all, g.c.AddTimes(times), nil
}

// open opens the connections that begin at a time, each for one expectation alone. What the policies of that time forbid was there before them.
func (g *game) open(ctx context.Context, attempts []*attempt, at float64) error {
	var wanted []*attempt
	for _, a := range attempts {
		if a.on != nil && a.on.OpenAt == at {
			wanted = append(wanted, a)
		}
	}
	refused := g.openAll(ctx, wanted)
	if len(refused) == 0 {
		return nil
	}
	return g.withoutPolicies(ctx, func() { g.openAll(ctx, refused) })
}

// openAll opens connections at once, and returns those that did not open.
func (g *game) openAll(ctx context.Context, attempts []*attempt) (refused []*attempt) {
	var wait sync.WaitGroup
	for _, a := range attempts {
		wait.Go(func() {
			if a.made, a.failed = g.connection(ctx, a.on.Flow); a.failed != nil {
				return
			}
			if a.e.IsLayer7() {
				if a.failed = g.openLayer7(ctx, a); a.failed != nil {
					a.made.connection.Close()
					a.made = nil
				}
				return
			}
			var m *probe.Message
			before := g.flows.Mark(a.made.connection.Tuples())
			if m, a.failed = a.made.connection.Forward(); a.failed == nil {
				a.failed = g.awaitAnswer(ctx, m, before)
			}
			if a.failed != nil {
				a.made.connection.Close()
				a.made = nil
			}
		})
	}
	wait.Wait()
	for _, a := range attempts {
		if a.failed != nil {
			refused = append(refused, a)
		}
	}
	return refused
}

// awaitAnswer waits for a message to come and to be answered, or to be dropped.
func (g *game) awaitAnswer(ctx context.Context, m *probe.Message, before live.Mark) error {
	limit := time.NewTimer(openLimit)
	defer limit.Stop()
	for {
		changed, told := g.net.Changed(), g.flows.Changed()
		if m.Arrived() && (!m.WantsAnswer || m.Answered()) {
			return nil
		}
		if len(dropped(g.flows.Since(before))) > 0 {
			return errors.New("the connection is forbidden")
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-limit.C:
			return fmt.Errorf("the connection did not open: arrived %v, answered %v", m.Arrived(), m.Answered())
		case <-changed:
		case <-told:
		}
	}
}
