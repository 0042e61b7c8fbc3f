// SPDX-License-Identifier: Apache-2.0

package pathnorm

import (
	"errors"
	"strings"
	"testing"
)

var all = Options{Dots: true, Merge: true, Slashes: Redirect}

func TestNormalize(t *testing.T) {
	tests := []struct {
		in, want string
		redirect bool
		err      error
	}{
		{in: "/", want: "/"},
		{in: "/a/b?x=/../y//z", want: "/a/b?x=/../y//z"},
		{in: "/public/../admin", want: "/admin"},
		{in: "/public/%2e%2e/admin", want: "/admin"},
		{in: "/public/%2E./admin", want: "/admin"},
		{in: "/public/.%2e", want: "/"},
		{in: "/../../x", want: "/x"},
		{in: "/a/./b/.", want: "/a/b/"},
		{in: "/a/b/..", want: "/a/"},
		{in: "//public", want: "/public"},
		{in: "///a////b//", want: "/a/b/"},
		{in: "/a//../b", want: "/a/b"},
		{in: "/...", want: "/..."},
		{in: "/.hidden/..x", want: "/.hidden/..x"},
		{in: "/%61%62c", want: "/abc"},
		{in: "/%7euser", want: "/~user"},
		{in: "/%25%32%46", want: "/%252F"},
		{in: "/%20%C3%a9", want: "/%20%C3%a9"},
		{in: "/a%2Fb", want: "/a/b", redirect: true},
		{in: "/a%2f..%2fb?q=%2F", want: "/b?q=%2F", redirect: true},
		{in: "/a%5Cb", want: "/a/b", redirect: true},
		{in: `/a\..\b`, want: "/b"},
		{in: "/%2F%2f", want: "/", redirect: true},
		{in: "/a%252Fb", want: "/a%252Fb"},
		{in: "/%", err: ErrMalformed},
		{in: "/%2", err: ErrMalformed},
		{in: "/%zz", err: ErrMalformed},
		{in: "/%%32F", err: ErrMalformed},
		{in: "/a?%zz", want: "/a?%zz"},
		{in: "*", want: "*"},
	}
	for _, tt := range tests {
		got, redirect, err := Normalize(tt.in, all)
		if got != tt.want || redirect != tt.redirect || !errors.Is(err, tt.err) {
			t.Errorf("Normalize(%q) = %q, %v, %v; want %q, %v, %v", tt.in, got, redirect, err, tt.want, tt.redirect, tt.err)
		}
	}
}

func TestOptions(t *testing.T) {
	tests := []struct {
		in   string
		o    Options
		want string
		err  error
	}{
		{"/a/../b//c%2fd", Options{}, "/a/../b//c%2fd", nil},
		{"/a/../b//c%2fd", Options{Dots: true}, "/b//c%2fd", nil},
		{"/a/../b//c%2fd", Options{Merge: true}, "/a/../b/c%2fd", nil},
		{"/a/../b//c%2fd", Options{Dots: true, Slashes: Unescape}, "/b//c/d", nil},
		{"/a%2fd", Options{Slashes: Reject}, "", ErrSlash},
	}
	for _, tt := range tests {
		got, _, err := Normalize(tt.in, tt.o)
		if got != tt.want || !errors.Is(err, tt.err) {
			t.Errorf("Normalize(%q, %+v) = %q, %v; want %q, %v", tt.in, tt.o, got, err, tt.want, tt.err)
		}
	}
}

// FuzzNormalize: what comes out is a fixed point, has no dot segment and no doubled or encoded slash, and keeps its query.
func FuzzNormalize(f *testing.F) {
	for _, s := range []string{"/", "/a/../b", "/%2e%2e/x", "//x", "/a%2fb?c", `/\..\`, "/%25%32%66", "/a/%2e"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		target := "/" + s
		out, _, err := Normalize(target, all)
		if err != nil {
			return
		}
		path, query, _ := strings.Cut(out, "?")
		if _, q, _ := strings.Cut(target, "?"); q != query {
			t.Errorf("query of %q became %q", target, query)
		}
		if path == "" || path[0] != '/' {
			t.Fatalf("Normalize(%q) = %q: no leading slash", target, out)
		}
		for _, seg := range strings.Split(path, "/") {
			if seg == "." || seg == ".." {
				t.Errorf("Normalize(%q) = %q has a dot segment", target, out)
			}
		}
		up := strings.ToUpper(path)
		if strings.Contains(path, "//") || strings.Contains(up, "%2F") || strings.Contains(up, "%5C") || strings.Contains(path, `\`) {
			t.Errorf("Normalize(%q) = %q", target, out)
		}
		again, redirect, err := Normalize(out, all)
		if err != nil || redirect || again != out {
			t.Errorf("Normalize(%q) = %q, but again %q, %v, %v", target, out, again, redirect, err)
		}
	})
}
