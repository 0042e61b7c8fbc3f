// SPDX-License-Identifier: Apache-2.0

package labelset

import (
	"strings"
	"testing"
)

func TestCheck(t *testing.T) {
	tests := []struct {
		name string
		set  Set
		want string // part of the error; empty = none
	}{
		{"good", Set{"k8s:a=1", "k8s:b=", "k8s:c=x=y:z"}, ""},
		{"empty", nil, "empty"},
		{"unsorted", Set{"k8s:b=1", "k8s:a=1"}, "not in order"},
		{"repeated", Set{"k8s:a=1", "k8s:a=1"}, "repeated"},
		{"no source", Set{"a=1"}, "no source"},
		{"empty source", Set{":a=1"}, "no source"},
		{"no value", Set{"k8s:a"}, "no value"},
		{"no key", Set{"k8s:=1"}, "no key"},
		{"control character", Set{"k8s:a=\x00"}, "not printable"},
		{"not utf-8", Set{"k8s:a=\xff"}, "not printable"},
		{"too large", Set{"k8s:a=" + strings.Repeat("x", MaxBytes)}, "larger"},
		{"too many", make(Set, MaxLabels+1), "more than"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			err := tt.set.Check()
			if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"k8s:app=todoui", "k8s:a=b=c", "a:b:c=", ":", "=", "k8s:io.kubernetes.pod.namespace=default"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		l, err := Parse(s)
		if err != nil {
			return
		}
		if l.String() != s {
			t.Errorf("Parse(%q).String() = %q", s, l.String())
		}
		if strings.Contains(l.Source, ":") || strings.Contains(l.Key, "=") || l.Source == "" || l.Key == "" {
			t.Errorf("Parse(%q) = %+v", s, l)
		}
	})
}
