// SPDX-License-Identifier: Apache-2.0

package runner

import (
	"fmt"
	"time"

	"github.com/weirmesh/weir/test/cases/format"
)

// Class is how an expectation came out.
type Class int

// Classes.
const (
	Passed Class = iota
	// WrongAllow is a hole: what should not have got through did.
	WrongAllow
	WrongDeny
	// Wrong is any other difference: the reason of a drop, a message, a flow.
	Wrong
	// NotRun could not be tried; that counts as failed.
	NotRun
	// NotYet belongs to a case that has a policy which Weir refuses as not enforceable yet.
	NotYet
)

// How an expectation was tried.
type How string

// Ways to try.
const (
	// Live: real connections between real ends.
	Live How = "live"
	// Crafted: real packets that a raw socket made, where the kernel has no sockets for them.
	Crafted How = "crafted"
	// Status: what the policy service says of an object.
	Status How = "status"
)

// Outcome is what became of one expectation.
type Outcome struct {
	// What it is, such as "expect[3] shop/a -> shop/b 80/TCP".
	What      string
	Class     Class
	How       How
	Want, Got string
	// Detail is what was seen, Reason the case's own.
	Detail, Reason string
}

// Result is what became of a case.
type Result struct {
	Case     *format.Case
	Outcomes []Outcome
	// NotYet has a line for each policy that Weir cannot enforce yet: the object, and the field.
	NotYet []string
	// Err is why the case could not be played to its end.
	Err error
	// Lab is the name of the lab if it was kept.
	Lab  string
	Took time.Duration
	// Phases say where the time went.
	Phases []Phase
	// Logs are lines of trouble in the logs of Weir's parts, if something failed.
	Logs string
}

// Phase is a part of a case's time.
type Phase struct {
	Name string
	Took time.Duration
}

// phase notes how long something took.
func (r *Result) phase(name string, began time.Time) {
	took := time.Since(began)
	for i := range r.Phases {
		if r.Phases[i].Name == name {
			r.Phases[i].Took += took
			return
		}
	}
	r.Phases = append(r.Phases, Phase{name, took})
}

// Failed reports whether anything is not as it should be.
func (r *Result) Failed() bool {
	if r.Err != nil {
		return true
	}
	for _, o := range r.Outcomes {
		if o.Class != Passed && o.Class != NotYet {
			return true
		}
	}
	return false
}

func (c Class) String() string {
	switch c {
	case Passed:
		return "passed"
	case WrongAllow:
		return "WRONG ALLOW"
	case WrongDeny:
		return "wrong deny"
	case Wrong:
		return "wrong"
	case NotRun:
		return "not run"
	case NotYet:
		return "not yet"
	}
	return fmt.Sprintf("class %d", int(c))
}

// describe is how lines name an expectation.
func describe(i int, e *format.Expectation) string {
	s := fmt.Sprintf("expect[%d] %s -> %s %s", i, e.From, e.To, ports(e.Flow))
	if e.Established {
		s += " (established)"
	}
	if e.ReplyOf.Kind != 0 {
		s += " (reply)"
	}
	if e.RelatedTo.Kind != 0 {
		s += " (related)"
	}
	if e.At != 0 {
		s += fmt.Sprintf(" at %gs", e.At)
	}
	return s
}

func ports(f format.Flow) string {
	switch {
	case f.ICMP != nil:
		return fmt.Sprintf("%s type %d code %d", f.Protocol, f.ICMP.Type, f.ICMP.Code)
	case f.Port == 0:
		return f.Protocol
	}
	return fmt.Sprintf("%d/%s", f.Port, f.Protocol)
}
