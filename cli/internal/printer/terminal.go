// SPDX-License-Identifier: Apache-2.0

package printer

import (
	"fmt"
	"strings"
	"unicode"
)

// Safe makes text from outside harmless on a terminal. ESC is shown as ^[ and
// CR as \r, as Hubble does. Beyond that, line ends and tabs cannot forge lines or
// columns, and other control and bidirectional-override characters are shown
// as what they are.
func Safe(s string) string {
	if strings.IndexFunc(s, unsafeRune) < 0 {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		switch {
		case !unsafeRune(r):
			b.WriteRune(r)
		case r == '\r':
			b.WriteString(`\r`)
		case r == '\n':
			b.WriteString(`\n`)
		case r == '\t':
			b.WriteString(`\t`)
		case r < 0x20:
			b.WriteByte('^')
			b.WriteRune(r + '@')
		case r == 0x7f:
			b.WriteString("^?")
		default:
			fmt.Fprintf(&b, `\u%04x`, r)
		}
	}
	return b.String()
}

func unsafeRune(r rune) bool {
	return unicode.IsControl(r) || unicode.Is(unicode.Bidi_Control, r)
}

func safeAll(list []string) []string {
	out := make([]string, len(list))
	for i, s := range list {
		out[i] = Safe(s)
	}
	return out
}
