// SPDX-License-Identifier: Apache-2.0

package flowsource

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/weirmesh/weir/cli/internal/flowmatch"
	"github.com/weirmesh/weir/cli/internal/stage"
	"github.com/weirmesh/weir/gen/observer"
	observerv1 "github.com/weirmesh/weir/gen/weir/observer/v1"
)

// maxLine bounds one line of a file.
const maxLine = 4 << 20

// FileOptions say what to take of a file.
type FileOptions struct {
	Matcher *flowmatch.Matcher
	// Since and Until bound the time of a line, both inclusive; nil = open.
	Since, Until *timestamppb.Timestamp
	Log          *slog.Logger
}

// File reads what the json format wrote, one record a line. A line that cannot
// be read is logged and left out; unknown fields are ignored and logged once.
// Losses pass while there are no filters, for filters are about flows.
func File(r io.Reader, opts FileOptions) stage.Recv[*observerv1.GetFlowsResponse] {
	s := bufio.NewScanner(r)
	s.Buffer(nil, maxLine)
	return (&file{FileOptions: opts, lines: s}).recv
}

type file struct {
	FileOptions
	lines  *bufio.Scanner
	number int
	// lenient is set by the first unknown field.
	lenient bool
}

func (f *file) recv() (*observerv1.GetFlowsResponse, error) {
	for f.lines.Scan() {
		f.number++
		line := bytes.TrimSpace(f.lines.Bytes())
		if len(line) == 0 {
			continue
		}
		r, err := f.decode(line)
		if err != nil {
			f.Log.Warn("cannot read a line of the input", "line", f.number, "error", err)
			continue
		}
		if r != nil && f.wanted(r) {
			return r, nil
		}
	}
	if err := f.lines.Err(); errors.Is(err, bufio.ErrTooLong) {
		return nil, fmt.Errorf("line %d of the input is longer than %d bytes", f.number+1, maxLine)
	} else if err != nil {
		return nil, fmt.Errorf("read input: %w", err)
	}
	return nil, io.EOF
}

// decode returns nil for a line that holds nothing to show.
func (f *file) decode(line []byte) (*observerv1.GetFlowsResponse, error) {
	if bytes.HasPrefix(line, []byte(`{"gap":`)) {
		return f.decodeGap(line)
	}
	r := &observer.GetFlowsResponse{}
	err := protojson.UnmarshalOptions{DiscardUnknown: f.lenient}.Unmarshal(line, r)
	if err != nil && !f.lenient {
		strict := err
		r = &observer.GetFlowsResponse{}
		if err = (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(line, r); err == nil {
			f.lenient = true
			f.Log.Warn("the input has unknown fields, perhaps from a newer version; they are ignored", "line", f.number, "error", strict)
		}
	}
	if err != nil {
		return nil, err
	}
	if r.GetResponseTypes() == nil {
		return nil, nil
	}
	return wrap(r), nil
}

func (f *file) decodeGap(line []byte) (*observerv1.GetFlowsResponse, error) {
	var envelope struct {
		Gap json.RawMessage `json:"gap"`
	}
	if err := json.Unmarshal(line, &envelope); err != nil {
		return nil, err
	}
	g := &observerv1.Gap{}
	if err := (protojson.UnmarshalOptions{DiscardUnknown: f.lenient}).Unmarshal(envelope.Gap, g); err != nil {
		return nil, err
	}
	return &observerv1.GetFlowsResponse{Item: &observerv1.GetFlowsResponse_Gap{Gap: g}}, nil
}

func (f *file) wanted(r *observerv1.GetFlowsResponse) bool {
	if r.GetResponse().GetFlow() == nil {
		return f.Matcher.All()
	}
	at := r.GetResponse().GetTime().AsTime()
	if f.Since != nil && at.Before(f.Since.AsTime()) || f.Until != nil && at.After(f.Until.AsTime()) {
		return false
	}
	return f.Matcher.Match(r.GetResponse().GetFlow())
}
