// SPDX-License-Identifier: Apache-2.0

package report

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/test/cases/format"
	"github.com/weirmesh/weir/test/cases/runner"
)

func TestReport(t *testing.T) {
	c := &format.Case{ID: "001-x", Area: format.Strings{"deny", "cidr"}}
	outcome := func(class runner.Class) runner.Outcome {
		return runner.Outcome{What: "expect[0]", Class: class, How: runner.Live, Want: "deny", Got: "allow", Reason: "why"}
	}
	for name, tt := range map[string]struct {
		result *runner.Result
		ok     bool
		want   []string
	}{
		"passed":      {&runner.Result{Case: c, Outcomes: []runner.Outcome{outcome(runner.Passed)}}, true, []string{"1 of 1 expectations passed", "live 1"}},
		"not yet":     {&runner.Result{Case: c, NotYet: []string{"CNP s/a: spec.x"}, Outcomes: []runner.Outcome{outcome(runner.NotYet)}}, true, []string{"001-x: CNP s/a: spec.x", "1 not yet, 0 failed"}},
		"wrong allow": {&runner.Result{Case: c, Outcomes: []runner.Outcome{outcome(runner.WrongAllow)}}, false, []string{"FAIL WRONG ALLOW: 001-x expect[0]: want deny, got allow", "(why)", "each a hole", "1 wrong allows, 0 wrong denies"}},
		"wrong deny":  {&runner.Result{Case: c, Outcomes: []runner.Outcome{outcome(runner.WrongDeny)}}, false, []string{"FAIL wrong deny", "0 wrong allows, 1 wrong denies"}},
		"broke off":   {&runner.Result{Case: c, Err: errors.New("no lab"), Outcomes: []runner.Outcome{outcome(runner.NotRun)}}, false, []string{"FAIL 001-x: broke off: no lab", "1 failed"}},
		"not run":     {&runner.Result{Case: c, Outcomes: []runner.Outcome{outcome(runner.NotRun)}}, false, []string{"FAIL not run", "1 failed"}},
	} {
		t.Run(name, func(t *testing.T) {
			var b strings.Builder
			r := New(&b, false)
			r.Add(tt.result)
			if ok := r.Print(time.Second); ok != tt.ok {
				t.Errorf("ok %t", ok)
			}
			for _, want := range tt.want {
				if !strings.Contains(b.String(), want) {
					t.Errorf("%q is not in\n%s", want, b.String())
				}
			}
		})
	}
	var b strings.Builder
	r := New(&b, false)
	r.Unreadable(errors.New("a.yaml: key x"))
	if r.Print(0) || !strings.Contains(b.String(), "a.yaml: key x") {
		t.Errorf("an unreadable case is no failure:\n%s", b.String())
	}
}
