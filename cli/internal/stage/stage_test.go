// SPDX-License-Identifier: Apache-2.0

package stage

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"
)

// words is a stream: f1, f2... count and are of that second, L does not count, anything else is an error.
func words(s string) Recv[string] {
	list := strings.Fields(s)
	return func() (string, error) {
		if len(list) == 0 {
			return "", io.EOF
		}
		w := list[0]
		list = list[1:]
		if w != "L" && w[0] != 'f' {
			return "", errors.New(w)
		}
		return w, nil
	}
}

func counts(w string) (time.Time, bool) {
	var second int64
	_, err := fmt.Sscanf(w, "f%d", &second)
	return time.Unix(second, 0), err == nil
}

func drain(r Recv[string]) string {
	var out []string
	for {
		w, err := r()
		switch {
		case errors.Is(err, io.EOF):
			return strings.Join(out, " ")
		case err != nil:
			return strings.Join(append(out, "!"+err.Error()), " ")
		}
		out = append(out, w)
	}
}

func TestStages(t *testing.T) {
	tail := func(n uint64) func(Recv[string]) Recv[string] {
		return func(r Recv[string]) Recv[string] { return Tail(r, counts, n) }
	}
	head := func(n uint64) func(Recv[string]) Recv[string] {
		return func(r Recv[string]) Recv[string] { return Head(r, counts, n) }
	}
	since3 := func(r Recv[string]) Recv[string] { return NotBefore(r, counts, time.Unix(3, 0)) }
	tests := []struct {
		in   string
		make func(Recv[string]) Recv[string]
		want string
	}{
		{"f1 f2 f3", tail(2), "f2 f3"},
		{"f1", tail(2), "f1"},
		{"", tail(2), ""},
		{"L f1 L f2 f3 L", tail(2), "L f2 f3 L"},
		{"f1 x", tail(2), "!x"},
		{"f1 " + strings.Repeat("L ", maxOthers+10), tail(1), strings.TrimSpace(strings.Repeat("L ", maxOthers))},
		{"f1 L f2 L f3", head(2), "f1 L f2"},
		{"f1", head(2), "f1"},
		{"f1 x", head(2), "f1 !x"},
		{"f1 L f5 f3 f2", since3, "L f5 f3"},
		{"f1 x", since3, "!x"},
	}
	for _, tt := range tests {
		if got := drain(tt.make(words(tt.in))); got != tt.want {
			t.Errorf("%.40s: got %.80s, want %.80s", tt.in, got, tt.want)
		}
	}
}
