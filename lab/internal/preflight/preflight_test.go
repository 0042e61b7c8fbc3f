// SPDX-License-Identifier: Apache-2.0

package preflight

import (
	"path/filepath"
	"strings"
	"testing"
)

func TestAtLeast(t *testing.T) {
	for _, tt := range []struct {
		release      string
		major, minor int
		want         bool
	}{
		{"6.18.44-custom", 6, 6, true}, {"6.6.0", 6, 6, true}, {"6.5.13", 6, 6, false}, {"5.14.0-1", 6, 6, false}, {"7.0", 6, 6, true},
		{"5.10-rc1", 5, 10, true}, {"", 5, 10, false}, {"six", 5, 10, false},
	} {
		if got := atLeast(tt.release, tt.major, tt.minor); got != tt.want {
			t.Errorf("%q at least %d.%d: %v", tt.release, tt.major, tt.minor, got)
		}
	}
}

// TestMissingPrograms: every missing program is named, with what to do.
func TestMissingPrograms(t *testing.T) {
	dir := t.TempDir()
	_, err := Check([]string{filepath.Join(dir, "weir-agent"), filepath.Join(dir, "weir-cni"), "/bin/sh"})
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range []string{"program weir-agent is missing in " + dir + ": run `make build`", "program weir-cni is missing"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not in\n%v", want, err)
		}
	}
	if strings.Contains(err.Error(), "program sh") {
		t.Errorf("a program that exists is missing:\n%v", err)
	}
}
