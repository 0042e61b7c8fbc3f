// SPDX-License-Identifier: Apache-2.0

package batch

import (
	"bytes"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/s2"
	"google.golang.org/protobuf/encoding/protowire"
)

// pack packs an encoded batch.
func pack(t testing.TB, data []byte) []byte {
	t.Helper()
	_, records, err := ParseHeader(data)
	if err != nil {
		t.Fatal(err)
	}
	var p Packer
	return p.Append(data[:len(data)-len(records):len(data)-len(records)], records)
}

func TestPacked(t *testing.T) {
	plain := large(t)
	data := pack(t, plain)
	if len(data) > len(plain)/10 {
		t.Errorf("%d bytes of %d", len(data), len(plain))
	}
	h, err := Check(data)
	if err != nil {
		t.Fatal(err)
	}
	got, err := Parse(data)
	if err != nil {
		t.Fatal(err)
	}
	want, err := Parse(plain)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want.Header, got.Header); diff != "" || !cmp.Equal(h, got.Header) || got.Len() != want.Len() {
		t.Fatalf("%d records, header (-want +got):\n%s", got.Len(), diff)
	}
	for i := range want.Len() {
		if got.Time(i) != want.Time(i) || got.Kind(i) != want.Kind(i) || !bytes.Equal(got.Item(i), want.Item(i)) || !bytes.Equal(got.Stats(i), want.Stats(i)) {
			t.Fatalf("record %d differs", i)
		}
	}
	if small := encode(t, sample()); !bytes.Equal(pack(t, small), small) {
		t.Error("a small batch was packed")
	}
}

func TestPackedRefused(t *testing.T) {
	plain := large(t)
	_, records, err := ParseHeader(plain)
	if err != nil {
		t.Fatal(err)
	}
	header := plain[: len(plain)-len(records) : len(plain)-len(records)]
	with := func(block []byte) []byte {
		return protowire.AppendBytes(protowire.AppendTag(header, fieldPacked, protowire.BytesType), block)
	}
	block := s2.Encode(nil, records)
	for _, tt := range []struct {
		name string
		data []byte
		want string
	}{
		{"cut", with(block)[:len(header)+20], "packed records"},
		{"no block", with(nil), "packed records"},
		{"damaged", with(block[:len(block)-5]), "packed records"},
		{"a record more", with(s2.Encode(nil, slices.Concat(records, records))), "records"},
		{"a field that is none", with(s2.Encode(nil, append(slices.Clone(records), 9<<3, 1))), "field 9 where records are"},
		{"more behind", append(with(block), records...), "more than its packed records"},
		{"a bomb", with(s2.Encode(nil, make([]byte, MaxBytes+1))), "more than"},
		{"records before", slices.Concat(plain, with(block)[len(header):]), "field 3 where records are"},
	} {
		if _, err := Check(tt.data); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: Check says %v, want %q", tt.name, err, tt.want)
		}
		if _, err := Parse(tt.data); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: Parse says %v, want %q", tt.name, err, tt.want)
		}
	}
}

func BenchmarkPack(b *testing.B) {
	_, records, err := ParseHeader(large(b))
	if err != nil {
		b.Fatal(err)
	}
	var p Packer
	b.SetBytes(int64(len(records)))
	b.ReportAllocs()
	for b.Loop() {
		p.Append(nil, records)
	}
}
