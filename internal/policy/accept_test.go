// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"fmt"
	"reflect"
	"regexp"
	"strings"
	"testing"
)

func TestAcceptsHTTP(t *testing.T) {
	headers := func(pairs ...string) []Header {
		var all []Header
		for i := 0; i < len(pairs); i += 2 {
			all = append(all, Header{pairs[i], pairs[i+1]})
		}
		return all
	}
	get := func(path string, pairs ...string) HTTPRequest {
		return HTTPRequest{Method: "GET", Path: path, Host: "a.b:80", Headers: headers(pairs...)}
	}
	need := func(mismatch string, pairs ...string) HTTPRule {
		h := HTTPRule{}
		for i := 0; i < len(pairs); i += 2 {
			h.HeaderMatches = append(h.HeaderMatches, HeaderMatch{Name: pairs[i], Value: pairs[i+1], Mismatch: mismatch})
		}
		return h
	}
	tests := []struct {
		name  string
		rules []HTTPRule
		q     HTTPRequest
		want  string // positions, and what is done
	}{
		{"nothing", nil, get("/"), "no"},
		{"everything", []HTTPRule{{}}, get("/"), "[0]"},
		{"path", []HTTPRule{{Path: "/public"}}, get("/public"), "[0]"},
		{"path is anchored", []HTTPRule{{Path: "/public"}}, get("/public/"), "no"},
		{"path and query", []HTTPRule{{Path: "/public"}}, get("/public?x=1"), "no"},
		{"path at its end", []HTTPRule{{Path: "/public"}}, get("/x/public"), "no"},
		{"written anchors", []HTTPRule{{Path: "^/public$"}}, get("/public"), "[0]"},
		{"a shorter alternative", []HTTPRule{{Path: "/a|/ab"}}, get("/ab"), "[0]"},
		{"a quote that does not end", []HTTPRule{{Path: `\Q/a.b`}}, get("/a.b"), "[0]"},
		{"rest", []HTTPRule{{Path: "/api/v1/products.*"}}, get("/api/v1/products?page=2"), "[0]"},
		{"case", []HTTPRule{{Method: "get"}}, get("/"), "no"},
		{"method", []HTTPRule{{Method: "GET|HEAD"}}, get("/"), "[0]"},
		{"method is anchored", []HTTPRule{{Method: "GE"}}, get("/"), "no"},
		{"host with port", []HTTPRule{{Host: "a.b"}}, get("/"), "no"},
		{"host", []HTTPRule{{Host: "a.b:80"}}, get("/"), "[0]"},
		{"host's dot", []HTTPRule{{Host: `a\.b:80`}}, HTTPRequest{Host: "aXb:80"}, "no"},
		{"normalised", []HTTPRule{{Path: "/public/.*"}}, get("/public/../admin"), "no"},
		{"normalised, encoded", []HTTPRule{{Path: "/admin"}}, get("/public/%2e%2E//admin"), "[0]"},
		{"not judged", []HTTPRule{{}}, get("/a%2Fb"), "no"},
		{"the query is not normalised", []HTTPRule{{Path: `/a\?b=/\.\./%2F`}}, get("/a?b=/../%2F"), "[0]"},
		{"first", []HTTPRule{{Path: "/x"}, {Method: "GET"}, {}}, get("/"), "[1]"},
		{"header", []HTTPRule{{Headers: []string{"X-A: 1"}}}, get("/", "x-a", "1"), "[0]"},
		{"header with more", []HTTPRule{{Headers: []string{"Content-Type: application/json"}}}, get("/", "content-type", "application/json; charset=utf-8"), "no"},
		{"header with two values", []HTTPRule{{Headers: []string{"X-A: 1,2"}}}, get("/", "x-a", "1", "X-A", "2"), "[0]"},
		{"header without colon", []HTTPRule{{Headers: []string{"X-A 1"}}}, get("/", "x-a", "1"), "[0]"},
		{"header that is there", []HTTPRule{{Headers: []string{"X-A"}}}, get("/", "x-a", ""), "[0]"},
		{"header with a colon that is there", []HTTPRule{{Headers: []string{"X-A:"}}}, get("/", "x-a", "9"), "[0]"},
		{"header that is not there", []HTTPRule{{Headers: []string{"X-A"}}}, get("/"), "no"},
		{"header without space", []HTTPRule{{Headers: []string{"X-A:1"}}}, get("/", "x-a", "1"), "no"},
		{"header's case of values", []HTTPRule{{Headers: []string{"X-A: a"}}}, get("/", "x-a", "A"), "no"},
		{"two headers", []HTTPRule{{Headers: []string{"X-A: 1", "X-B"}}}, get("/", "x-a", "1"), "no"},
		{"wanted header", []HTTPRule{need("", "X-A", "1")}, get("/", "x-a", "1"), "[0]"},
		{"wanted header, missing", []HTTPRule{need("", "X-A", "1")}, get("/"), "no"},
		{"wanted header that is there", []HTTPRule{need("", "X-A", "")}, get("/", "x-a", "7"), "[0]"},
		{"LOG, as required", []HTTPRule{need("LOG", "X-A", "1")}, get("/", "x-a", "1"), "[0]"},
		{"LOG", []HTTPRule{need("LOG", "X-A", "1")}, get("/"), "[0] {0 LOG X-A 1}"},
		{"ADD", []HTTPRule{need("ADD", "X-A", "1")}, get("/", "x-a", "2"), "[0] {0 ADD X-A 1}"},
		{"DELETE", []HTTPRule{need("DELETE", "X-A", "1")}, get("/", "x-a", "2"), "[0] {0 DELETE X-A 1}"},
		{"REPLACE", []HTTPRule{need("REPLACE", "X-A", "1", "X-B", "2")}, get("/", "x-b", "2"), "[0] {0 REPLACE X-A 1}"},
		{"ADD of no value", []HTTPRule{need("ADD", "X-A", "")}, get("/"), "[0] {0 LOG X-A }"},
		{"all items, for one has an action", []HTTPRule{{Path: "/"}, need("ADD", "X-A", "1"), need("", "X-A", "1"), {}}, get("/"), "[0 1 3] {1 ADD X-A 1}"},
		{"actions of items that do not match", []HTTPRule{{Path: "/x", HeaderMatches: need("ADD", "X-A", "1").HeaderMatches}, {}}, get("/"), "[1]"},
		{"not even with a later header", []HTTPRule{{HeaderMatches: append(need("ADD", "X-A", "1").HeaderMatches, need("", "X-B", "1").HeaderMatches...)}}, get("/"), "no"},
	}
	for _, tt := range tests {
		f := &Filter{Kind: FilterHTTP}
		for i, rule := range tt.rules {
			f.HTTP = append(f.HTTP, HTTPItem{i, rule})
		}
		rules, mutations, ok := f.AcceptsHTTP(tt.q)
		got := "no"
		if ok {
			got = fmt.Sprint(rules)
			for _, m := range mutations {
				got += fmt.Sprint(" ", m)
			}
		}
		if got != tt.want {
			t.Errorf("%s: %s, want %s", tt.name, got, tt.want)
		}
	}
	if _, _, ok := (&Filter{Kind: FilterHTTP, Visibility: true}).AcceptsHTTP(get("/")); !ok {
		t.Error("a request that is only seen is refused")
	}
}

func TestAcceptsNames(t *testing.T) {
	f := &Filter{Kind: FilterDNS, DNS: []DNSItem{{0, NameSelector{MatchName: "a.b"}}, {0, NameSelector{MatchPattern: "*.b"}}, {2, NameSelector{"x", "*.y"}}}}
	for name, want := range map[string][]int{"A.B.": {0}, "c.b": {0}, "x": {2}, "q.y": {2}, "b": nil, "": nil} {
		if rules, ok := f.AcceptsDNS(name); !reflect.DeepEqual(rules, want) || ok != (want != nil) {
			t.Errorf("%q: %v %t, want %v", name, rules, ok, want)
		}
	}
	if rules, ok := (&Filter{Kind: FilterDNS, DNS: []DNSItem{{Rule: 3}}}).AcceptsDNS("a..b c"); !ok || len(rules) != 1 {
		t.Error("an item for everything does not match")
	}
	if _, ok := (&Filter{Kind: FilterDNS, Visibility: true}).AcceptsDNS("a"); !ok {
		t.Error("a query that is only seen is refused")
	}
	s := &Filter{Kind: FilterTLS, TLS: []TLSItem{{Rule: 1, ServerNames: []string{"*.b", "c"}}}}
	for _, c := range []struct {
		name string
		tls  bool
		want bool
	}{{"a.b", true, true}, {"A.b.", true, true}, {"c", true, true}, {"c", false, false}, {"", true, false}, {"b", true, false}, {"a.a.b", true, false}} {
		if _, ok := s.AcceptsSNI(c.name, c.tls); ok != c.want {
			t.Errorf("%q, TLS %t: %t", c.name, c.tls, ok)
		}
	}
	s.TLS = append(s.TLS, TLSItem{Rule: 2, Any: true})
	if rules, ok := s.AcceptsSNI("", false); !ok || len(rules) != 1 {
		t.Errorf("%v %t", rules, ok)
	}
}

func TestMatchName(t *testing.T) {
	for _, c := range []struct {
		pattern string
		yes, no []string
	}{
		{"=cilium.io", []string{"cilium.io", "CILIUM.io."}, []string{"www.cilium.io", "", "cilium.io.."}},
		{"=.", []string{".", ""}, []string{"a"}},
		{"*.cilium.io", []string{"www.cilium.io", "w_w-1.cilium.io."}, []string{"cilium.io", "a.b.cilium.io", "a b.cilium.io"}},
		{"*cilium.io", []string{"cilium.io", "subcilium.io"}, []string{"www.cilium.io"}},
		{"sub*.cilium.io", []string{"sub.cilium.io", "subdomain.cilium.io"}, []string{"www.cilium.io", "sub.x.cilium.io"}},
		{"part*ial.com", []string{"partial.com", "part-extra-ial.com"}, []string{"part.ial.com"}},
		{"**.cilium.io", []string{"a.cilium.io", "b.a.cilium.io"}, []string{"cilium.io", ".cilium.io", "a..cilium.io", "xcilium.io"}},
		{"**.*.io", []string{"a.b.io", "c.a.b.io"}, []string{"b.io"}},
		{"*", []string{"a", "", ".", "a.b.c", "a b"}, nil},
		{"**", []string{"a", "."}, nil},
		{"*.", []string{"a.b", "."}, nil},
		{"a**.b", []string{"a.b", "axy.b"}, []string{"a.x.b"}},
		{"***.b", []string{"a.b", ".b"}, []string{"a.a.b", "b"}},
		{"*a*b*.c", []string{"ab.c", "xaxbx.c", "aab.c"}, []string{"ba.c", "a.b.c"}},
		{"a.*.c.", []string{"a.b.c", "a..c"}, []string{"a.b.b.c", "a.c"}},
	} {
		s := NameSelector{MatchPattern: c.pattern}
		if name, ok := strings.CutPrefix(c.pattern, "="); ok {
			s = NameSelector{MatchName: name}
		}
		for _, name := range c.yes {
			if !MatchName(s, name) {
				t.Errorf("%s does not match %q", c.pattern, name)
			}
		}
		for _, name := range c.no {
			if MatchName(s, name) {
				t.Errorf("%s matches %q", c.pattern, name)
			}
		}
	}
	if MatchName(NameSelector{}, "a") || MatchName(NameSelector{}, "") {
		t.Error("a selector with neither matches")
	}
}

func TestMatchServerName(t *testing.T) {
	for _, c := range []struct {
		pattern string
		yes, no []string
	}{
		{"a.b", []string{"a.b", "A.B."}, []string{"", "x.a.b"}},
		{"*", []string{"a", "a.b_c-1"}, []string{"", "a..b", "a b", "é.b"}},
		{"**", []string{"a.b"}, []string{""}},
		{"*.cilium.io", []string{"a.cilium.io"}, []string{"cilium.io", "a.b.cilium.io"}},
		{"sub*.cilium.io", []string{"sub.cilium.io", "subx.cilium.io"}, []string{"sub.x.cilium.io"}},
		{"**.cilium.io", []string{"a.cilium.io", "a.b.cilium.io"}, []string{"cilium.io"}},
		{"a.**.com", []string{"a.b.com"}, []string{"a.b.c.com", "a.com"}},
		{"***.com", []string{"a.com"}, []string{"a.b.com"}},
	} {
		for _, name := range c.yes {
			if !MatchServerName(c.pattern, name) {
				t.Errorf("%s does not match %q", c.pattern, name)
			}
		}
		for _, name := range c.no {
			if MatchServerName(c.pattern, name) {
				t.Errorf("%s matches %q", c.pattern, name)
			}
		}
	}
}

// nameExpression is what a pattern means, as an expression (spec 8.2).
func nameExpression(pattern string) *regexp.Regexp {
	pattern = strings.TrimSuffix(strings.ToLower(pattern), ".")
	if pattern == "*" || pattern == "**" {
		return regexp.MustCompile(`(?s)^.*$`)
	}
	prefix := ""
	if rest, ok := strings.CutPrefix(pattern, "**."); ok {
		prefix, pattern = `([-a-z0-9_]+\.)+`, rest
	}
	return regexp.MustCompile(`(?s)^` + prefix + strings.ReplaceAll(regexp.QuoteMeta(pattern), `\*`, `[-a-z0-9_]*`) + `$`)
}

// FuzzMatchName compares the matcher with an expression.
func FuzzMatchName(f *testing.F) {
	for _, c := range []struct{ pattern, name string }{
		{"*.cilium.io", "www.cilium.io"}, {"**.a", "b.b.a"}, {"*a*b*.c", "aabb.c"}, {"*", "."}, {"a**.b.", "axb.b"}, {"**.*a*", "x.ba"}, {"**..a", "b..a"},
	} {
		f.Add(c.pattern, c.name)
	}
	f.Fuzz(func(t *testing.T, pattern, name string) {
		if pattern == "" || strings.ToLower(pattern) != pattern || strings.ToLower(name) != name {
			return // folding is beside the point here
		}
		want := nameExpression(pattern).MatchString(strings.TrimSuffix(name, "."))
		if got := MatchName(NameSelector{MatchPattern: pattern}, name); got != want {
			t.Errorf("%q, %q: %t, want %t", pattern, name, got, want)
		}
		MatchServerName(pattern, name)
	})
}

// FuzzCovers: a wider selector matches whatever name the narrower one does.
func FuzzCovers(f *testing.F) {
	for _, c := range []struct{ wide, narrow, name string }{
		{"**.a", "*.a", "x.a"}, {"*.a", "x*.a", "xy.a"}, {"*", "**.a", "b.a"}, {"**.b.a", "x*.b.a", "x.b.a"}, {"*.a", "**.a", "b.b.a"},
	} {
		f.Add(c.wide, c.narrow, c.name)
	}
	f.Fuzz(func(t *testing.T, wide, narrow, name string) {
		if strings.HasPrefix(name, ".") || strings.Contains(name, "..") {
			return // no name
		}
		w, n := NameSelector{MatchPattern: canonicalName(wide)}, NameSelector{MatchPattern: canonicalName(narrow)}
		if w.covers(n) && MatchName(n, name) && !MatchName(w, name) {
			t.Errorf("%q covers %q, but does not match %q", wide, narrow, name)
		}
	})
}

func TestNormalizePath(t *testing.T) {
	for _, c := range []struct {
		target, want string
		redirect     bool
	}{
		{"/", "/", false},
		{"", "", false},
		{"*", "*", false},
		{"a/../b", "a/../b", false},
		{"/a/b", "/a/b", false},
		{"//public", "/public", false},
		{"/a//b///", "/a/b/", false},
		{"/x/../public", "/public", false},
		{"/a/./b/.", "/a/b/", false},
		{"/a/b/..", "/a/", false},
		{"/..", "/", false},
		{"/../../a", "/a", false},
		{"/a//../b", "/a/b", false},
		{"/...", "/...", false},
		{"/a/%2e%2e/b", "/b", false},
		{"/%61%7E%5f", "/a~_", false},
		{"/%252e%252e/a", "/%252e%252e/a", false},
		{"/a%20b%3F", "/a%20b%3F", false},
		{"/a%2", "/a%2", false},
		{"/a%zz%", "/a%zz%", false},
		{`/a\..\b`, "/b", false},
		{"/a/%2%65%2%65/b", "/b", false},
		{"/a/%2%46..", "/a/", true},
		{"/a%2Fb", "/a/b", true},
		{"/a%2fb?c=%2F", "/a/b?c=%2F", true},
		{"/a/%5C../b", "/a/b", true},
		{"/a/%2e%2e%2fadmin", "/admin", true},
		{"/a?b=/../%2e//x", "/a?b=/../%2e//x", false},
		{"/a?b?c", "/a?b?c", false},
		{"/..?x", "/?x", false},
		{"?x", "?x", false},
	} {
		got, redirect := NormalizePath(c.target)
		if got != c.want || redirect != c.redirect {
			t.Errorf("%q: %q %t, want %q %t", c.target, got, redirect, c.want, c.redirect)
		}
	}
}

// FuzzNormalizePath: what comes out is normal, and stays as it is.
func FuzzNormalizePath(f *testing.F) {
	for _, s := range []string{"/", "/a/../b?c", "//a/%2e%2E/b", "/%2F%5c", "/%252e", "/a/./.././..", "*", "/%", `/\..\`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, target string) {
		normal, _ := NormalizePath(target)
		path, query, _ := strings.Cut(normal, "?")
		if _, before, _ := strings.Cut(target, "?"); query != before {
			t.Errorf("%q: the query has become %q", target, query)
		}
		if !strings.HasPrefix(target, "/") {
			if normal != target {
				t.Errorf("%q: %q", target, normal)
			}
			return
		}
		if !strings.HasPrefix(path, "/") || strings.Contains(path, "//") || strings.ContainsAny(path, `\`) {
			t.Errorf("%q: %q", target, normal)
		}
		for segment := range strings.SplitSeq(path, "/") {
			if segment == "." || segment == ".." {
				t.Errorf("%q: %q has the segment %q", target, normal, segment)
			}
		}
		if again, redirect := NormalizePath(normal); again != normal || redirect {
			t.Errorf("%q: %q, and then %q %t", target, normal, again, redirect)
		}
	})
}

func TestParseVisibility(t *testing.T) {
	tests := []struct {
		text string
		want []Visibility
		err  string
	}{
		{"", nil, ""},
		{"  ", nil, ""},
		{"<egress/53/UDP/DNS>,<ingress/8090/TCP/HTTP>", []Visibility{{Ingress, 8090, TCP, FilterHTTP}, {Egress, 53, UDP, FilterDNS}}, ""},
		{"<Egress/53/ANY/dns> , <Ingress/80/tcp/Http>", []Visibility{{Ingress, 80, TCP, FilterHTTP}, {Egress, 53, TCP, FilterDNS}, {Egress, 53, UDP, FilterDNS}}, ""},
		{"<Egress/80/TCP/HTTP>,<Ingress/80/TCP/HTTP>", []Visibility{{Ingress, 80, TCP, FilterHTTP}, {Egress, 80, TCP, FilterHTTP}}, ""},
		{"<Ingress/80/TCP/HTTP>,<Ingress/80/ANY/HTTP>", []Visibility{{Ingress, 80, TCP, FilterHTTP}}, ""},
		{"<Ingress/80/ANY/HTTP>", []Visibility{{Ingress, 80, TCP, FilterHTTP}}, ""},
		{"<Ingress/80/UDP/HTTP>,<Egress/53/SCTP/DNS>,<Ingress/9092/TCP/Kafka>", nil, ""},
		{"<Ingress/80/TCP/HTTP>,<Ingress/80/TCP/Kafka>", nil, "the same port is to be read as HTTP and as KAFKA"},
		{"<Egress/53/UDP/DNS>,<Egress/53/ANY/HTTP>", nil, "the same port is to be read as DNS and as HTTP"},
		{"<Ingress/53/UDP/DNS>", nil, "DNS cannot be seen on ingress"},
		{"<Egress/9092/TCP/Kafka>", nil, "Kafka cannot be seen on egress"},
		{"<Ingress/80/TCP/Redis>", nil, `L7 protocol "Redis"`},
		{"<Ingress/80/ICMP/HTTP>", nil, `protocol "ICMP"`},
		{"<Ingress/0/TCP/HTTP>", nil, `port "0"`},
		{"<Ingress/080/TCP/HTTP>", nil, `port "080"`},
		{"<Ingress/+80/TCP/HTTP>", nil, `port "+80"`},
		{"<Ingress/65536/TCP/HTTP>", nil, `port "65536"`},
		{"<Ingress//TCP/HTTP>", nil, `port ""`},
		{"<Sideways/80/TCP/HTTP>", nil, `direction "Sideways"`},
		{"<Ingress/80/TCP/HTTP", nil, "want <direction/port/L4/L7>"},
		{"<Ingress/80/TCP>", nil, "want <direction/port/L4/L7>"},
		{"< Ingress/80/TCP/HTTP>", nil, `direction " Ingress"`},
		{"<Ingress/80/TCP/HTTP>,", nil, "want <direction/port/L4/L7>"},
		{"true", nil, "want <direction/port/L4/L7>"},
		{strings.Repeat("<Ingress/80/TCP/HTTP>,", 128) + "<Ingress/80/TCP/HTTP>", nil, "129 parts, the max is 128"},
	}
	for _, tt := range tests {
		got, err := ParseVisibility(tt.text)
		if (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) || !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%q: %v, %v; want %v, %q", tt.text, got, err, tt.want, tt.err)
		}
	}
}

// FuzzParseVisibility: what is taken can be written and read again.
func FuzzParseVisibility(f *testing.F) {
	f.Add("<egress/53/UDP/DNS>,<ingress/8090/TCP/HTTP>")
	f.Add("<Ingress/80/ANY/Kafka>, <Egress/1/SCTP/http>")
	f.Add("<>,<///>")
	f.Fuzz(func(t *testing.T, text string) {
		all, err := ParseVisibility(text)
		if err != nil {
			if all != nil {
				t.Errorf("%q: %v beside the error %v", text, all, err)
			}
			return
		}
		var parts []string
		for _, v := range all {
			if v.Port == 0 || v.Direction != Ingress && v.Direction != Egress {
				t.Errorf("%q: %+v", text, v)
			}
			direction := map[Direction]string{Ingress: "ingress", Egress: "egress"}[v.Direction]
			parts = append(parts, fmt.Sprintf("<%s/%d/%s/%s>", direction, v.Port, protocolName(v.Proto), v.Kind))
		}
		again, err := ParseVisibility(strings.Join(parts, ","))
		if err != nil || !reflect.DeepEqual(again, all) {
			t.Errorf("%q: %v, then %v, %v", text, all, again, err)
		}
	})
}
