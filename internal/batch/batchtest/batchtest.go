// SPDX-License-Identifier: Apache-2.0

// Package batchtest decodes batches for tests.
package batchtest

import (
	"fmt"

	"github.com/klauspost/compress/s2"
	"google.golang.org/protobuf/proto"

	flowv1 "github.com/weirmesh/weir/gen/weir/flow/v1"
)

// Decode returns the message of an encoded batch, with its records unpacked.
func Decode(data []byte) (*flowv1.Batch, error) {
	b := &flowv1.Batch{}
	if err := proto.Unmarshal(data, b); err != nil {
		return nil, fmt.Errorf("decode batch: %w", err)
	}
	if len(b.GetCompressedRecords()) == 0 {
		return b, nil
	}
	records, err := s2.Decode(nil, b.GetCompressedRecords())
	if err != nil {
		return nil, fmt.Errorf("unpack batch: %w", err)
	}
	b.CompressedRecords = nil
	if err := (proto.UnmarshalOptions{Merge: true}).Unmarshal(records, b); err != nil {
		return nil, fmt.Errorf("decode records: %w", err)
	}
	return b, nil
}
