// SPDX-License-Identifier: Apache-2.0

package names

import (
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/net/dns/dnsmessage"
)

func TestAnswer(t *testing.T) {
	z, err := parseZone([]string{"api.example.com=203.0.113.5,2001:db8::5/7", "www.Example.com=api.example.com./9"})
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name  string
		kind  dnsmessage.Type
		rcode dnsmessage.RCode
		want  []netip.Addr
	}{
		{"api.example.com", dnsmessage.TypeA, 0, []netip.Addr{netip.MustParseAddr("203.0.113.5")}},
		{"API.example.com", dnsmessage.TypeAAAA, 0, []netip.Addr{netip.MustParseAddr("2001:db8::5")}},
		{"www.example.com", dnsmessage.TypeA, 0, []netip.Addr{netip.MustParseAddr("203.0.113.5")}},
		{"api.example.com", dnsmessage.TypeMX, 0, nil},
		{"other.example.com", dnsmessage.TypeA, dnsmessage.RCodeNameError, nil},
	} {
		query, err := question(7, test.name, test.kind)
		if err != nil {
			t.Fatal(err)
		}
		got, err := parse(z.answer(query), 7)
		if err != nil || got.RCode != test.rcode || !slices.Equal(got.Addresses, test.want) {
			t.Errorf("%s %s: %+v, %v; want %v %v", test.name, test.kind, got, err, test.rcode, test.want)
		}
	}
	if _, err := parseZone([]string{"x"}); err == nil {
		t.Error("a record without a value is taken")
	}
}

func FuzzAnswer(f *testing.F) {
	z, err := parseZone([]string{"a.b=192.0.2.1/1", "c.d=a.b./1"})
	if err != nil {
		f.Fatal(err)
	}
	query, err := question(1, "c.d", dnsmessage.TypeA)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(query)
	f.Fuzz(func(t *testing.T, b []byte) {
		if answer := z.answer(b); answer != nil {
			var m dnsmessage.Message
			if err := m.Unpack(answer); err != nil {
				t.Errorf("answer to %x cannot be read: %v", b, err)
			}
		}
	})
}
