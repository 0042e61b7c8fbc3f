// SPDX-License-Identifier: Apache-2.0

package dnswire

import (
	"bytes"
	"errors"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/dns"
)

func pack(t testing.TB, m *dns.Msg) []byte {
	t.Helper()
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func queryOf(t testing.TB, name string, kind uint16) []byte {
	return pack(t, new(dns.Msg).SetQuestion(name, kind))
}

func rr(t testing.TB, text string) dns.RR {
	t.Helper()
	r, err := dns.NewRR(text)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func answerOf(t testing.TB, name string, kind uint16, records ...string) []byte {
	t.Helper()
	m := new(dns.Msg).SetQuestion(name, kind)
	m.Response, m.Compress = true, true
	for _, r := range records {
		m.Answer = append(m.Answer, rr(t, r))
	}
	return pack(t, m)
}

func TestReadQuery(t *testing.T) {
	plain := queryOf(t, "WwW.Example.com.", dns.TypeAAAA)
	edns := pack(t, new(dns.Msg).SetQuestion("a.", dns.TypeA).SetEdns0(4096, true))
	signed := new(dns.Msg).SetQuestion("a.", dns.TypeA).SetEdns0(4096, false)
	signed.SetTsig("key.", dns.HmacSHA256, 300, 1)
	change := func(b []byte, f func([]byte) []byte) []byte { return f(bytes.Clone(b)) }
	for _, c := range []struct {
		name string
		msg  []byte
		want string // name, or the error
		size uint16 // that it asks for after LimitSize(1232)
		edns bool
	}{
		{name: "mixed case", msg: plain, want: "www.example.com."},
		{name: "root", msg: queryOf(t, ".", dns.TypeNS), want: "."},
		{name: "edns", msg: edns, want: "a.", edns: true, size: 1232},
		{name: "signed", msg: pack(t, signed), want: "a.", edns: true, size: 4096},
		{name: "small edns", msg: pack(t, new(dns.Msg).SetQuestion("a.", dns.TypeA).SetEdns0(512, false)), want: "a.", edns: true, size: 512},
		{name: "dot in a label", msg: queryOf(t, `a\.b.example.`, dns.TypeA), want: `a\.b.example.`},
		{name: "byte in a label", msg: queryOf(t, `\000\255.example.`, dns.TypeA), want: `\000\255.example.`},
		{name: "empty", want: ErrIgnore.Error()},
		{name: "header alone", msg: plain[:12], want: ErrFormat.Error()},
		{name: "cut name", msg: plain[:15], want: ErrFormat.Error()},
		{name: "cut type", msg: plain[:len(plain)-3], want: ErrFormat.Error()},
		{name: "more at the end", msg: append(bytes.Clone(plain), 0), want: ErrFormat.Error()},
		{name: "answer", msg: change(plain, func(b []byte) []byte { b[2] |= 0x80; return b }), want: ErrIgnore.Error()},
		{name: "update", msg: change(plain, func(b []byte) []byte { b[2] |= 5 << 3; return b }), want: ErrNotImplemented.Error()},
		{name: "no question", msg: change(plain, func(b []byte) []byte { b[5] = 0; return b }), want: ErrFormat.Error()},
		{name: "two questions", msg: change(plain, func(b []byte) []byte { b[5] = 2; return append(b, b[12:]...) }), want: ErrFormat.Error()},
		{name: "pointer in the question", msg: change(plain, func(b []byte) []byte { b[12], b[13] = 0xc0, 4; return b }), want: ErrFormat.Error()},
		{name: "two OPT", msg: change(edns, func(b []byte) []byte { b[11] = 2; return append(b, b[len(b)-11:]...) }), want: ErrFormat.Error()},
		{name: "more records said than there", msg: change(edns, func(b []byte) []byte { b[11] = 2; return b }), want: ErrFormat.Error()},
		{name: "long name", msg: longName(t), want: ErrFormat.Error()},
	} {
		t.Run(c.name, func(t *testing.T) {
			q, err := ReadQuery(c.msg)
			if err != nil {
				if err.Error() != c.want {
					t.Fatalf("error %q, want %q", err, c.want)
				}
				return
			}
			if q.Name != c.want || q.EDNS != c.edns {
				t.Fatalf("name %q, edns %v; want %q, %v", q.Name, q.EDNS, c.want, c.edns)
			}
			q.LimitSize(c.msg, 1232)
			var m dns.Msg
			if err := m.Unpack(c.msg); err != nil {
				t.Fatal(err)
			}
			if o := m.IsEdns0(); o != nil && o.UDPSize() != c.size {
				t.Errorf("size %d, want %d", o.UDPSize(), c.size)
			}
		})
	}
}

// longName is a query for 256 bytes of labels.
func longName(t testing.TB) []byte {
	b := queryOf(t, ".", dns.TypeA)
	var labels []byte
	for range 4 {
		labels = append(append(labels, 63), bytes.Repeat([]byte{'a'}, 63)...)
	}
	return slices.Concat(b[:12], labels, b[12:])
}

func TestReadAnswer(t *testing.T) {
	for _, c := range []struct {
		name    string
		msg     []byte
		addrs   []string
		cnames  []string
		ttl     uint32
		bad     bool
		records int
	}{
		{name: "one", msg: answerOf(t, "A.example.", dns.TypeA, "a.example. 30 IN A 1.2.3.4"), addrs: []string{"1.2.3.4"}, ttl: 30, records: 1},
		{name: "both families, lowest ttl", msg: answerOf(t, "a.", dns.TypeANY, "a. 30 IN A 1.2.3.4", "a. 20 IN AAAA 2001:db8::1", `a. 5 IN TXT "x"`),
			addrs: []string{"1.2.3.4", "2001:db8::1"}, ttl: 20, records: 3},
		{name: "chain", msg: answerOf(t, "a.", dns.TypeA, "b. 10 IN CNAME c.", "c. 60 IN A 1.1.1.1", "a. 300 IN CNAME b."),
			addrs: []string{"1.1.1.1"}, cnames: []string{"b.", "c."}, ttl: 10, records: 3},
		{name: "chain without end", msg: answerOf(t, "a.", dns.TypeA, "a. 1 IN CNAME b.", "b. 1 IN CNAME a.", "a. 1 IN A 6.6.6.6"), ttl: 1, records: 3,
			addrs: []string{"6.6.6.6"}, cnames: slices.Repeat([]string{"b.", "a."}, maxAliases/2)},
		{name: "another name's address", msg: answerOf(t, "a.", dns.TypeA, "a. 9 IN A 1.2.3.4", "victim. 9 IN A 6.6.6.6"),
			addrs: []string{"1.2.3.4"}, ttl: 9, records: 2},
		{name: "the alias's owner keeps none", msg: answerOf(t, "a.", dns.TypeA, "a. 9 IN CNAME b.", "a. 9 IN A 6.6.6.6", "b. 9 IN A 1.2.3.4"),
			addrs: []string{"1.2.3.4"}, cnames: []string{"b."}, ttl: 9, records: 3},
		{name: "hints of HTTPS records", msg: answerOf(t, "a.", dns.TypeHTTPS, `a. 9 IN HTTPS 1 . ipv4hint="6.6.6.6"`), ttl: 9, records: 1},
		{name: "another class", msg: answerOf(t, "a.", dns.TypeA, "a. 9 CH A 6.6.6.6"), ttl: 9, records: 1},
		{name: "mapped", msg: answerOf(t, "a.", dns.TypeAAAA, "a. 9 IN AAAA ::ffff:1.2.3.4"), addrs: []string{"1.2.3.4"}, ttl: 9, records: 1},
		{name: "none", msg: answerOf(t, "a.", dns.TypeA)},
		{name: "cut", msg: answerOf(t, "a.", dns.TypeA, "a. 9 IN A 1.2.3.4")[:20], bad: true},
		{name: "query", msg: queryOf(t, "a.", dns.TypeA), bad: true},
		{name: "pointer to itself", msg: loop(t), bad: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, err := ReadAnswer(c.msg, "")
			if c.bad != (err != nil) || err != nil && !errors.Is(err, ErrFormat) {
				t.Fatalf("error %v, want one: %v", err, c.bad)
			}
			if c.bad {
				return
			}
			var addrs []string
			for _, x := range a.Addresses {
				addrs = append(addrs, x.String())
			}
			if !slices.Equal(addrs, c.addrs) || !slices.Equal(a.CNAMEs, c.cnames) || a.TTL != c.ttl || len(a.Types) != c.records {
				t.Errorf("got %v, %v, ttl %d, %d records; want %v, %v, %d, %d", addrs, a.CNAMEs, a.TTL, len(a.Types), c.addrs, c.cnames, c.ttl, c.records)
			}
		})
	}
}

// loop is an answer whose record's owner is a pointer to itself.
func loop(t testing.TB) []byte {
	b := answerOf(t, "a.", dns.TypeA, "a. 9 IN A 1.2.3.4")
	b[19], b[20] = 0xc0, 19
	return b
}

func TestTruncatedAnswerKeepsWhatIsWhole(t *testing.T) {
	b := answerOf(t, "a.", dns.TypeA, "a. 9 IN A 1.2.3.4", "a. 9 IN A 1.2.3.5")
	b[2] |= 2 // TC
	a, err := ReadAnswer(b[:len(b)-3], "")
	if err != nil || !slices.Equal(a.Addresses, []netip.Addr{netip.MustParseAddr("1.2.3.4")}) || !a.Truncated {
		t.Errorf("got %+v, %v", a, err)
	}
}

func TestExtendedCode(t *testing.T) {
	m := new(dns.Msg).SetQuestion("a.", dns.TypeA).SetEdns0(1232, false)
	m.Response = true
	m.Rcode = dns.RcodeBadVers
	a, err := ReadAnswer(pack(t, m), "")
	if err != nil || a.RCode != dns.RcodeBadVers {
		t.Errorf("code %d, %v; want %d", a.RCode, err, dns.RcodeBadVers)
	}
}

func TestAnswersQuestion(t *testing.T) {
	q, err := ReadQuery(queryOf(t, "Abc.example.", dns.TypeA))
	if err != nil {
		t.Fatal(err)
	}
	empty := pack(t, &dns.Msg{MsgHdr: dns.MsgHdr{Response: true}})
	emptyError := pack(t, &dns.Msg{MsgHdr: dns.MsgHdr{Response: true, Rcode: dns.RcodeFormatError}})
	for _, c := range []struct {
		name string
		msg  []byte
		want bool
	}{
		{"same", answerOf(t, "Abc.example.", dns.TypeA), true},
		{"other case", answerOf(t, "aBC.EXAMPLE.", dns.TypeA), true},
		{"other name", answerOf(t, "abd.example.", dns.TypeA), false},
		{"other length", answerOf(t, "abc.example.x.", dns.TypeA), false},
		{"other type", answerOf(t, "abc.example.", dns.TypeAAAA), false},
		{"no question", empty, false},
		{"no question, error", emptyError, true},
	} {
		a, err := ReadAnswerHead(c.msg, "")
		if err != nil {
			t.Fatal(err)
		}
		if got := a.Answers(q.Wire); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

func TestReply(t *testing.T) {
	for _, msg := range [][]byte{
		queryOf(t, "MiXed.example.", dns.TypeA),
		pack(t, new(dns.Msg).SetQuestion("a.", dns.TypeHTTPS).SetEdns0(4096, true)),
	} {
		q, err := ReadQuery(msg)
		if err != nil {
			t.Fatal(err)
		}
		for _, b := range [][]byte{AppendReply(nil, msg, &q, RCodeRefused), AppendTruncated(nil, msg, &q)} {
			var asked, got dns.Msg
			if err := errors.Join(asked.Unpack(msg), got.Unpack(b)); err != nil {
				t.Fatal(err)
			}
			if !got.Response || got.Id != asked.Id || got.Question[0] != asked.Question[0] || (got.IsEdns0() != nil) != q.EDNS ||
				!got.RecursionDesired || got.Truncated == (got.Rcode == dns.RcodeRefused) {
				t.Errorf("answer %v to %v", &got, &asked)
			}
		}
	}
}

// FuzzQuery compares with the library: whatever we read, it reads as the same question.
func FuzzQuery(f *testing.F) {
	f.Add(queryOf(f, "WwW.Example.com.", dns.TypeAAAA))
	f.Add(pack(f, new(dns.Msg).SetQuestion(`a\.b.\000c.`, dns.TypeA).SetEdns0(4096, true)))
	f.Fuzz(func(t *testing.T, msg []byte) {
		q, err := ReadQuery(msg)
		if err != nil {
			if !errors.Is(err, ErrIgnore) {
				AppendReply(nil, msg, &q, RCodeFormatError)
			}
			return
		}
		var m dns.Msg
		if err := m.Unpack(msg); err != nil {
			t.Skip("the library reads what is in records, too")
		}
		if len(m.Question) != 1 || libraryName(m.Question[0].Name) != q.Name || m.Question[0].Qtype != q.Type || m.Question[0].Qclass != q.Class {
			t.Fatalf("library: %v, we: %+v", m.Question, q)
		}
		q.LimitSize(msg, 1232)
		reply := AppendReply(nil, msg, &q, RCodeRefused)
		if err := m.Unpack(reply); err != nil {
			t.Fatalf("reply %x: %v", reply, err)
		}
	})
}

// FuzzAnswer compares with the library: whatever it reads as addresses of the name, so do we, and no more.
func FuzzAnswer(f *testing.F) {
	f.Add(answerOf(f, "a.example.", dns.TypeA, "a.example. 30 IN CNAME b.example.", "b.example. 9 IN A 1.2.3.4", "c.example. 9 IN AAAA ::1"))
	f.Add(append([]byte{0, 1, 0x80, 0, 0, 0, 0, 1, 0, 0, 0, 0}, "\x01a\x00\x00\x01\x00\x01\x00\x00\x00\x09\x00\x04\x01\x02\x03\x04"...)) // no question
	f.Add(answerOf(f, "a.", dns.TypeANY, "a. 30 IN A 1.2.3.4", "a. 20 IN AAAA 2001:db8::1", `a. 5 IN TXT "x"`, "a. 4 IN MX 1 m.a."))
	f.Fuzz(func(t *testing.T, msg []byte) {
		a, err := ReadAnswer(msg, "")
		for _, likely := range []string{a.Name, "a.", "a.example."} {
			if b, likelyErr := ReadAnswer(msg, likely); !reflect.DeepEqual(a, b) || !errors.Is(likelyErr, err) {
				t.Fatalf("likely %q: %+v, %v; else: %+v, %v", likely, b, likelyErr, a, err)
			}
		}
		var m dns.Msg
		if libraryErr := m.Unpack(msg); libraryErr != nil || a.Truncated || err != nil {
			return
		}
		if len(m.Question) == 0 || m.Question[0].Qclass != dns.ClassINET {
			if len(a.Addresses) != 0 {
				t.Fatalf("addresses %v of no question", a.Addresses)
			}
			return
		}
		if libraryName(m.Question[0].Name) != a.Name {
			t.Fatalf("library: %v, we: %q", m.Question, a.Name)
		}
		if want := libraryAddresses(&m); !slices.Equal(want, a.Addresses) {
			t.Fatalf("library: %v, we: %v in %v", want, a.Addresses, &m)
		}
	})
}

// libraryName is the library's text of a name as ours.
func libraryName(name string) string {
	return strings.ReplaceAll(dns.CanonicalName(name), `\ `, `\032`)
}

func libraryAddresses(m *dns.Msg) []netip.Addr {
	name := dns.CanonicalName(m.Question[0].Name)
	for range maxAliases {
		i := slices.IndexFunc(m.Answer, func(r dns.RR) bool {
			c, ok := r.(*dns.CNAME)
			return ok && c.Hdr.Class == dns.ClassINET && dns.CanonicalName(c.Hdr.Name) == name
		})
		if i < 0 {
			break
		}
		c, _ := m.Answer[i].(*dns.CNAME)
		name = dns.CanonicalName(c.Target)
	}
	var out []netip.Addr
	for _, r := range m.Answer {
		if h := r.Header(); dns.CanonicalName(h.Name) != name || h.Class != dns.ClassINET {
			continue
		}
		switch r := r.(type) {
		case *dns.A:
			if a, ok := netip.AddrFromSlice(r.A); ok {
				out = append(out, a.Unmap())
			}
		case *dns.AAAA:
			if a, ok := netip.AddrFromSlice(r.AAAA); ok {
				out = append(out, a.Unmap())
			}
		}
	}
	return out
}

func BenchmarkRead(b *testing.B) {
	query := queryOf(b, "www.example.com.", dns.TypeA)
	answer := answerOf(b, "www.example.com.", dns.TypeA, "www.example.com. 30 IN A 1.2.3.4", "www.example.com. 30 IN A 1.2.3.5")
	b.Run("query", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := ReadQuery(query); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("answer", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := ReadAnswer(answer, ""); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("answer by the library", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			var m dns.Msg
			if err := m.Unpack(answer); err != nil {
				b.Fatal(err)
			}
		}
	})
}
