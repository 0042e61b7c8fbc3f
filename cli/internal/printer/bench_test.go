// SPDX-License-Identifier: Apache-2.0

package printer

import (
	"io"
	"testing"
)

func BenchmarkPrint(b *testing.B) {
	r := response(base())
	for name, format := range map[string]Format{"compact": Compact, "dict": Dict, "json": JSON, "flat": Flat} {
		b.Run(name, func(b *testing.B) {
			p := New(Options{Out: io.Discard, Format: format})
			b.ReportAllocs()
			for b.Loop() {
				if err := p.Response(r); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
