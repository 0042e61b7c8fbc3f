// SPDX-License-Identifier: Apache-2.0

package printer

import "github.com/weirmesh/weir/gen/flow"

// ANSI codes of the colours in use.
const (
	red     = "31"
	green   = "32"
	yellow  = "33"
	magenta = "35"
	cyan    = "36"
)

// painter wraps text into a colour when it is on.
type painter struct{ on bool }

func (p painter) color(code, s string) string {
	if !p.on {
		return s
	}
	return "\x1b[" + code + "m" + s + "\x1b[0m"
}

func (p painter) verdict(v flow.Verdict, s string) string {
	switch v {
	case flow.Verdict_FORWARDED, flow.Verdict_REDIRECTED:
		return p.color(green, s)
	case flow.Verdict_DROPPED, flow.Verdict_ERROR:
		return p.color(red, s)
	case flow.Verdict_AUDIT, flow.Verdict_TRACED, flow.Verdict_TRANSLATED:
		return p.color(yellow, s)
	}
	return s
}

func (p painter) auth(t flow.AuthType, s string) string {
	if t == flow.AuthType_TEST_ALWAYS_FAIL {
		return p.color(red, s)
	}
	return p.color(green, s)
}
