// SPDX-License-Identifier: Apache-2.0

package batch

import (
	"errors"
	"fmt"
	"sync"

	"github.com/klauspost/compress/s2"
	"google.golang.org/protobuf/encoding/protowire"
)

// minPacked is the size below which records are not packed: a single flow wins little.
const minPacked = 2048

// Packer packs records. Not safe for concurrent use; the zero value is ready.
type Packer struct{ room []byte }

// Append appends a batch's records, encoded fields `records`, to its header: packed when that is smaller. Most of a flow is labels that the flow before
// had too, and every byte is copied and encrypted three times on its way to the observer.
func (p *Packer) Append(to, records []byte) []byte {
	if len(records) >= minPacked && len(records) <= MaxBytes {
		if n := s2.MaxEncodedLen(len(records)); cap(p.room) < n {
			p.room = make([]byte, n)
		}
		if small := s2.Encode(p.room[:cap(p.room)], records); len(small) < len(records) {
			to = protowire.AppendTag(to, fieldPacked, protowire.BytesType)
			to = protowire.AppendVarint(to, uint64(len(small)))
			// Growing does not clear the memory that the copy fills.
			return append(to[:len(to):len(to)], small...)
		}
	}
	return append(to[:len(to):len(to)], records...)
}

// rooms are buffers for records that are only looked at.
var rooms = sync.Pool{New: func() any { return new([]byte) }}

// packed says whether what follows a header is packed.
func packed(rest []byte) bool {
	number, typ, n := protowire.ConsumeTag(rest)
	return n > 0 && number == fieldPacked && typ == protowire.BytesType
}

// unpack returns the records behind a header: as they are, or unpacked into room, which it returns as it is then. It bounds what a lying length can cost.
func unpack(room, rest []byte) (records, grown []byte, err error) {
	if !packed(rest) {
		return rest, room, nil
	}
	_, _, n := protowire.ConsumeTag(rest)
	block, m := protowire.ConsumeBytes(rest[n:])
	if m < 0 {
		return nil, room, fmt.Errorf("packed records: %w", protowire.ParseError(m))
	}
	if len(rest) != n+m {
		return nil, room, errors.New("batch has more than its packed records")
	}
	size, err := s2.DecodedLen(block)
	if err != nil {
		return nil, room, fmt.Errorf("packed records: %w", err)
	}
	if size > MaxBytes {
		return nil, room, fmt.Errorf("packed records have %d bytes, more than %d", size, MaxBytes)
	}
	if cap(room) < size {
		room = make([]byte, size)
	}
	if records, err = s2.Decode(room[:cap(room)], block); err != nil {
		return nil, room, fmt.Errorf("packed records: %w", err)
	}
	return records, room, nil
}
