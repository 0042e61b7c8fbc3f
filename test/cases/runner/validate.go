// SPDX-License-Identifier: Apache-2.0

package runner

import (
	"context"
	"fmt"
	"slices"
	"strings"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	"github.com/weirmesh/weir/test/cases/format"
	"github.com/weirmesh/weir/test/cases/live"
)

// validate compares what the policy service says of objects and endpoints.
func (g *game) validate(ctx context.Context) ([]Outcome, error) {
	var outcomes []Outcome
	var listed []*policyv1.PolicyObject
	for i := range g.c.Validation {
		v := &g.c.Validation[i]
		if v.Endpoint != "" && listed == nil {
			var err error
			if listed, err = g.lab.List(ctx); err != nil {
				return nil, err
			}
		}
		o := Outcome{How: Status, Reason: v.Reason}
		if v.Policy != "" {
			o.What = fmt.Sprintf("validation[%d] %s", i, v.Policy)
			g.validateObject(&o, v)
		} else {
			o.What = fmt.Sprintf("validation[%d] endpoint %s", i, v.Endpoint)
			validateEndpoint(&o, v, listed, len(g.notYet) > 0)
		}
		outcomes = append(outcomes, o)
	}
	return outcomes, nil
}

func validity(valid bool) string {
	if valid {
		return "valid"
	}
	return "refused"
}

func (g *game) validateObject(o *Outcome, v *format.Validation) {
	o.Want = validity(*v.Valid)
	if v.MessageContains != "" {
		o.Want += fmt.Sprintf(" with %q", v.MessageContains)
	}
	if v.OrEnforced {
		o.Want += ", or enforced"
	}
	o.Class, o.Got = Wrong, "no such object"
	if len(g.notYet) > 0 {
		o.Class = NotYet // the case ended before it came
	}
	for _, object := range slices.Backward(g.all) {
		if !names(v.Policy, object.Ref) {
			continue
		}
		o.Got, o.Detail = validity(object.Valid()), object.Message()
		o.Class = judgeObject(object, v)
		if o.Class == Passed {
			return
		}
	}
}

func judgeObject(object *live.Object, v *format.Validation) Class {
	notYet := object.Status.GetNotYet() != ""
	switch {
	case *v.Valid && object.Valid():
		return Passed
	case *v.Valid && notYet:
		return NotYet
	case *v.Valid:
		return Wrong
	case v.OrEnforced && (object.Valid() || notYet):
		return Passed
	case !object.Valid() && strings.Contains(object.Message(), v.MessageContains):
		return Passed
	}
	return Wrong
}

func validateEndpoint(o *Outcome, v *format.Validation, listed []*policyv1.PolicyObject, notYet bool) {
	var conflicts []string
	for _, p := range listed {
		for _, c := range p.Conflicts {
			if text, found := strings.CutPrefix(c, v.Endpoint+":"); found && !slices.Contains(conflicts, text) {
				conflicts = append(conflicts, text)
			}
		}
	}
	o.Want, o.Got, o.Detail = "computed", "computed", strings.Join(conflicts, "; ")
	if !*v.PolicyComputed {
		o.Want = fmt.Sprintf("a conflict with %q", v.MessageContains)
	}
	if len(conflicts) > 0 {
		o.Got = "a conflict"
	}
	told := slices.ContainsFunc(conflicts, func(c string) bool { return strings.Contains(c, v.MessageContains) })
	switch {
	case *v.PolicyComputed == (len(conflicts) == 0) && (*v.PolicyComputed || told):
		o.Class = Passed
	case notYet:
		o.Class = NotYet
	default:
		o.Class = Wrong
	}
}
