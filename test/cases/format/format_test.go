// SPDX-License-Identifier: Apache-2.0

package format

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestFaultsAreNamed(t *testing.T) {
	const head = "id: x\npods: [{name: a, namespace: s}]\n"
	for name, c := range map[string]struct{ text, want string }{
		"unknown key":                {head + "expectt: []", "expectt"},
		"unknown key of an item":     {head + "expect: [{from: s/a, to: s/a, port: 1, verdict: allow, prot: TCP}]", "prot"},
		"unknown option":             {head + "config: {l8: true}", "l8"},
		"unknown pod":                {head + "expect: [{from: s/b, to: s/a, port: 1, verdict: allow}]", "s/b"},
		"unknown end":                {head + "expect: [{from: moon, to: s/a, port: 1, verdict: allow}]", "moon"},
		"unknown verdict":            {head + "expect: [{from: s/a, to: s/a, port: 1, verdict: maybe}]", "maybe"},
		"unknown protocol":           {head + "expect: [{from: s/a, to: s/a, port: 1, protocol: QUIC, verdict: deny}]", "QUIC"},
		"unknown connection":         {head + "expect: [{from: s/a, to: s/a, port: 1, verdict: deny, reply_of: c9}]", "c9"},
		"unknown key of a reference": {head + "expect: [{from: s/a, to: s/a, port: 1, verdict: deny, reply_of: {form: s/a}}]", "form"},
		"bad address":                {"id: x\npods: [{name: a, ip: 10.0.0}]", "10.0.0"},
		"two documents":              {head + "---\nid: y", "more than one document"},
		"validation of nothing":      {head + "validation: [{valid: false}]", "validation[0]"},
		"aliases without end":        {head + "policies: [&a {x: &b [*b]}]", "nested"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Parse([]byte(c.text))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v does not name %q", err, c.want)
			}
		})
	}
}

func TestObjectsStayAsWritten(t *testing.T) {
	c, err := Parse([]byte(`
id: x
policies:
- kind: A
  metadata: {name: one, namespace: s}
  spec: {empty: [], one: [{}], nothing: null, tilde: ~, blank: , text: "80", number: 80, yes: "true", shared: &s [a]}
- {kind: B, metadata: {name: two}, spec: {shared: *s}}
`))
	if err != nil {
		t.Fatal(err)
	}
	one, err := Document(&c.Policies[0])
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"empty: []", "one: [{}]", "nothing: null", "tilde: ~", `text: "80"`, "number: 80", `yes: "true"`, "shared: [a]"} {
		if !strings.Contains(string(one), want) {
			t.Errorf("%q is not in\n%s", want, one)
		}
	}
	two, err := Document(&c.Policies[1])
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(two), "shared: [a]") {
		t.Errorf("alias left in\n%s", two)
	}
	if r := RefOf(&c.Policies[0]); r != (Ref{"A", "s", "one"}) || r.String() != "s/one" {
		t.Errorf("ref %v", r)
	}
}

func TestReferencesToConnections(t *testing.T) {
	c, err := Parse([]byte(`
id: x
pods: [{name: a, namespace: s}, {name: b, namespace: s}]
connections:
- {id: early, from: s/a, to: s/b, port: 80, protocol: TCP, open_at: 0, close_at: 5}
- {id: late, from: s/a, to: s/b, port: 80, protocol: TCP, open_at: 6}
expect:
- {from: s/a, to: s/b, port: 80, protocol: TCP, at: 8, established: true, verdict: allow}
- {from: s/b, to: s/a, port: 1, at: 2, reply_of: early, verdict: allow}
- {from: s/b, to: s/a, port: 1, at: 8, reply_of: {from: s/a, to: s/b, port: 80}, verdict: allow}
- {from: s/b, to: s/a, icmp: {type: 3}, at: 2, related_to: 1, verdict: allow}
- {from: s/b, to: s/a, port: 1, at: 2, reply_of: {from: s/a, to: s/b, port: 81}, verdict: allow}
`))
	if err != nil {
		t.Fatal(err)
	}
	if got := c.Live(&c.Expect[0]); got.ID != "late" {
		t.Errorf("established: %+v", got)
	}
	for i, want := range map[int]string{1: "early", 2: "late", 3: "late", 4: ""} {
		e := &c.Expect[i]
		ref := &e.ReplyOf
		if i == 3 {
			ref = &e.RelatedTo
		}
		if got, err := c.Connection(ref, e); err != nil || got.ID != want {
			t.Errorf("expect[%d]: %+v, %v; want %q", i, got, err, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	files, err := filepath.Glob("../testdata/*.yaml")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte("policies: [&a [*a, *a]]"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := Parse(data)
		if err != nil {
			return
		}
		// What was accepted can be passed on, and means the same again.
		for i := range c.Policies {
			if _, err := Document(&c.Policies[i]); err != nil {
				t.Fatalf("policy %d: %v", i, err)
			}
		}
		for i := range c.Expect {
			e := &c.Expect[i]
			if e.Established && c.Live(e) == nil {
				t.Fatalf("expect[%d] has no connection", i)
			}
		}
	})
}
