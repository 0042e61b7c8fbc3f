// SPDX-License-Identifier: Apache-2.0

// Package selection turns --first, --last, --all, --since, --until and
// --follow into what a server is asked for and what is left to do here.
//
// Servers that speak Hubble's API give the oldest N flows for "since X, N" and
// count N from the newest flow whatever the end of the window. People who
// type --last mean the newest N of the window; a Plan gets them from any server.
package selection

import (
	"errors"
	"fmt"
	"math"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/weirmesh/weir/cli/internal/timeval"
)

const (
	// DefaultNumber is how many flows are shown when nothing else is asked for.
	DefaultNumber = 20
	// MaxTail is the most that is held in memory to find the newest flows of a window or a file.
	MaxTail = 1_000_000
)

// Flags are the selectors as given.
type Flags struct {
	First, Last  uint64
	All, Follow  bool
	Since, Until string
}

// Plan is how to get what the flags mean.
type Plan struct {
	// The fields of the request.
	Number       uint64
	First        bool
	Follow       bool
	Since, Until *timestamppb.Timestamp
	// Tail keeps the newest flows of what the server sends; 0 = all.
	Tail uint64
	// NotBefore drops older flows that the server sends; zero = none.
	NotBefore time.Time
}

// ForServer plans a call.
func (f Flags) ForServer(now time.Time, loc *time.Location) (Plan, error) {
	p, err := f.window(now, loc)
	if err != nil {
		return Plan{}, err
	}
	switch {
	case f.First > 0:
		p.Number, p.First = f.First, true
	case f.Last > 0 && p.Until != nil:
		// The window comes whole.
		if f.Last > MaxTail {
			return Plan{}, fmt.Errorf("--last must be <= %d together with --until, got %d", MaxTail, f.Last)
		}
		p.Tail = f.Last
	case f.Last > 0 && p.Since != nil:
		// The newest N of all, less those that are too old, are the newest N since then.
		p.Number, p.NotBefore, p.Since = f.Last, p.Since.AsTime(), nil
	case f.Last > 0:
		p.Number = f.Last
	case p.Since != nil || p.Until != nil:
	case f.All:
		p.Number = math.MaxUint64
	case !f.Follow:
		p.Number = DefaultNumber
	}
	return p, nil
}

// ForFile plans the reading of a file: everything, unless the flags say less.
func (f Flags) ForFile(now time.Time, loc *time.Location) (Plan, error) {
	p, err := f.window(now, loc)
	if err != nil {
		return Plan{}, err
	}
	if f.First > 0 {
		p.Number, p.First = f.First, true
	}
	if f.Last > MaxTail {
		return Plan{}, fmt.Errorf("--last must be <= %d, got %d", MaxTail, f.Last)
	}
	p.Tail = f.Last
	return p, nil
}

// ForEvents plans a call for agent or debug events, which come 20 at a time, with --follow too.
func (f Flags) ForEvents(now time.Time, loc *time.Location) (Plan, error) {
	p, err := f.ForServer(now, loc)
	if err == nil && f.Follow && f.Last == 0 && p.Since == nil {
		p.Number = DefaultNumber
		if f.All {
			p.Number = math.MaxUint64
		}
	}
	return p, err
}

func (f Flags) window(now time.Time, loc *time.Location) (Plan, error) {
	var p Plan
	switch {
	case f.First > 0 && f.Last > 0:
		return p, errors.New("cannot set both --first and --last")
	case f.First > 0 && f.All:
		return p, errors.New("cannot set both --first and --all")
	case f.First > 0 && f.Follow:
		return p, errors.New("cannot set both --first and --follow")
	case f.Last > 0 && f.All:
		return p, errors.New("cannot set both --last and --all")
	}
	p.Follow = f.Follow
	var err error
	if p.Since, err = parse("since", f.Since, now, loc); err != nil {
		return p, err
	}
	// Following has no end.
	if !f.Follow {
		p.Until, err = parse("until", f.Until, now, loc)
	}
	return p, err
}

func parse(name, s string, now time.Time, loc *time.Location) (*timestamppb.Timestamp, error) {
	if s == "" {
		return nil, nil
	}
	t, err := timeval.Parse(s, now, loc)
	if err != nil {
		return nil, fmt.Errorf("failed to parse the %s time: %w", name, err)
	}
	ts := timestamppb.New(t)
	if err := ts.CheckValid(); err != nil {
		return nil, fmt.Errorf("failed to parse the %s time: %w", name, err)
	}
	return ts, nil
}
