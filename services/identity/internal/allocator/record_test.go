// SPDX-License-Identifier: Apache-2.0

package allocator

import (
	"reflect"
	"testing"
	"time"

	"github.com/weirmesh/weir/internal/labelset"
)

func TestNumberKey(t *testing.T) {
	tests := []struct {
		key  string
		want uint32
		ok   bool
	}{
		{"n.256", 256, true}, {"n.4294967295", 1<<32 - 1, true},
		{"n.0256", 0, false}, {"n.+256", 0, false}, {"n.", 0, false}, {"l.256", 0, false}, {"n.4294967296", 0, false},
	}
	for _, tt := range tests {
		got, ok := parseNumberKey(tt.key)
		if ok != tt.ok || ok && got != tt.want {
			t.Errorf("parseNumberKey(%q) = %d, %t", tt.key, got, ok)
		}
	}
}

func TestDecodeLinkRefuses(t *testing.T) {
	for _, data := range []string{
		``, `[]`, `{"entries":[{"number":0,"labels":["k8s:a=1"]}]}`, `{"entries":[{"number":256}]}`,
		`{"entries":[{"number":256,"labels":["k8s:b=1","k8s:a=1"]}]}`,
		`{"entries":[{"number":256,"labels":["k8s:a=1"]},{"number":257,"labels":["k8s:a=1"]}]}`,
	} {
		if _, err := decodeLink([]byte(data)); err == nil {
			t.Errorf("decodeLink(%s) succeeded", data)
		}
	}
}

func FuzzDecodeLink(f *testing.F) {
	f.Add(encode(link{Entries: []linkEntry{{Number: 256, Labels: labelset.Set{"k8s:a=1", "k8s:b=<&>"}}}}))
	f.Add(encode(link{Entries: []linkEntry{{Number: 1, Labels: labelset.Set{"k8s:a="}, Released: time.Unix(1, 2).UTC()}}}))
	f.Add([]byte(`{"entries":[{}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		l, err := decodeLink(data)
		if err != nil {
			return
		}
		again, err := decodeLink(encode(l))
		if err != nil || !reflect.DeepEqual(again, l) && len(l.Entries) > 0 {
			t.Errorf("%s: %+v became %+v, %v", data, l, again, err)
		}
	})
}

func FuzzDecodeClaim(f *testing.F) {
	f.Add(encode(claim{Labels: labelset.Set{"k8s:a=1"}}))
	f.Add([]byte(`{"labels":["a"]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := decodeClaim(data)
		if err != nil {
			return
		}
		if again, err := decodeClaim(encode(c)); err != nil || !again.Labels.Equal(c.Labels) {
			t.Errorf("%s: %+v became %+v, %v", data, c, again, err)
		}
	})
}
