// SPDX-License-Identifier: Apache-2.0

package yamltext

import (
	"bytes"
	"encoding/json"
	"reflect"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

func TestFromJSON(t *testing.T) {
	for in, want := range map[string]string{
		`{"kind":"X","spec":{"ingress":[{}],"egress":[],"none":null,"on":true}}`:       "kind: X\nspec:\n  ingress:\n    - {}\n  egress: []\n  none: null\n  \"on\": true\n",
		`{"port":"8080","n":8080,"f":1.5,"big":9007199254740993,"no":"no","t":"true"}`: "port: \"8080\"\n\"n\": 8080\nf: 1.5\nbig: 9007199254740993\n\"no\": \"no\"\nt: \"true\"\n",
		`{"z":1,"a":{"b":[1,[2]]}}`: "z: 1\na:\n  b:\n    - 1\n    - - 2\n",
		`"\u001b[31mred\u202e"`:     "\"\\e[31mred\\u202E\"\n",
	} {
		got, err := FromJSON([]byte(in))
		if err != nil || string(got) != want {
			t.Errorf("%s\ngot  %q, %v\nwant %q", in, got, err, want)
		}
	}
	for _, in := range []string{``, `{`, `{"a":}`, `{} {}`, `[1,`, strings.Repeat("[", 300) + strings.Repeat("]", 300)} {
		if got, err := FromJSON([]byte(in)); err == nil {
			t.Errorf("%s was taken: %q", in, got)
		}
	}
}

// What comes out is the same document, and moves no cursor.
func FuzzFromJSON(f *testing.F) {
	for _, s := range []string{
		`{"kind":"CiliumNetworkPolicy","spec":{"ingress":[{}],"egress":[]}}`, `[1,-2.5,1e3,null,true,"\u0000","\u202e","~","0x1","2001-01-01","<<","=","1_000"]`,
		`{"":{"a: b":"c #d"},"- x":"|\nline\n"}`, `"\ud83d\ude00\ufffd"`, `0123`, `{"a":1,"a":2}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		out, err := FromJSON(data)
		if err != nil {
			return
		}
		if bytes.ContainsFunc(out, func(r rune) bool { return r < 0x20 && r != '\n' || r == 0x7f || r == 0x9b || r == 0x202e }) {
			t.Errorf("%q: control characters in %q", data, out)
		}
		var want, got any
		if json.Unmarshal(data, &want) != nil || repeats(data) {
			return
		}
		if err := yaml.Unmarshal(out, &got); err != nil {
			t.Fatalf("%q: %q is no YAML: %v", data, out, err)
		}
		text, err := json.Marshal(got)
		if err != nil {
			t.Fatal(err)
		}
		var again any
		if err := json.Unmarshal(text, &again); err != nil || !reflect.DeepEqual(again, want) {
			t.Errorf("%q became %q: %v, want %v", data, out, again, want)
		}
	})
}

// repeats reports a member that stands twice in an object, which YAML refuses.
func repeats(data []byte) bool {
	d := json.NewDecoder(bytes.NewReader(data))
	var inObject func() bool
	inObject = func() bool {
		token, err := d.Token()
		if err != nil {
			return false
		}
		delim, ok := token.(json.Delim)
		if !ok {
			return false
		}
		seen := map[any]bool{}
		found := false
		for d.More() {
			if delim == '{' {
				key, err := d.Token()
				if err != nil {
					return found
				}
				found = found || seen[key]
				seen[key] = true
			}
			found = inObject() || found
		}
		_, _ = d.Token() // its end
		return found
	}
	return inObject()
}
