// SPDX-License-Identifier: Apache-2.0

package printer

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/weirmesh/weir/cli/internal/plainjson"
	"github.com/weirmesh/weir/gen/flow"
	"github.com/weirmesh/weir/gen/observer"
	observerv1 "github.com/weirmesh/weir/gen/weir/observer/v1"
)

// json writes m by proto3's JSON mapping with proto names, on one line.
func (p *Printer) json(w io.Writer, m proto.Message) error {
	if w == nil {
		return nil
	}
	line, err := jsonLine(m)
	if err != nil {
		return err
	}
	return write(w, line+"\n")
}

func jsonLine(m proto.Message) (string, error) {
	text, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
	if r, ok := m.(*observer.GetFlowsResponse); ok && err != nil && r.GetFlow().GetExtensions() != nil {
		// An extension of a type that is not linked in cannot be shown; the flow can.
		r = proto.CloneOf(r)
		r.GetFlow().Extensions = nil
		text, err = protojson.MarshalOptions{UseProtoNames: true}.Marshal(r)
	}
	if err != nil {
		return "", fmt.Errorf("encode %s: %w", m.ProtoReflect().Descriptor().FullName(), err)
	}
	// protojson varies its spaces on purpose.
	var compact, escaped bytes.Buffer
	if err := json.Compact(&compact, text); err != nil {
		return "", fmt.Errorf("encode %s: %w", m.ProtoReflect().Descriptor().FullName(), err)
	}
	json.HTMLEscape(&escaped, compact.Bytes())
	return escaped.String(), nil
}

// gapJSON writes {"gap":{...},"node_name":"...","time":"..."}: a line like the others, told apart by its first key.
func (p *Printer) gapJSON(g *observerv1.Gap, at *timestamppb.Timestamp) error {
	gap, err := jsonLine(g)
	if err != nil {
		return err
	}
	rest, err := jsonLine(&observer.GetFlowsResponse{NodeName: g.GetNodeName(), Time: at})
	if err != nil {
		return err
	}
	line := `{"gap":` + gap
	if rest != "{}" {
		line += "," + rest[1:]
	} else {
		line += "}"
	}
	return write(p.opts.Out, line+"\n")
}

// flat writes the bare flow with numbers as numbers.
func (p *Printer) flat(f *flow.Flow) error {
	b, err := plainjson.Append(p.buf[:0], f)
	if err != nil {
		return fmt.Errorf("encode flow: %w", err)
	}
	p.buf = append(b, '\n')
	if _, err := p.opts.Out.Write(p.buf); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}

// plain is an event in the flat format: the bare message, as a flow is.
func (p *Printer) plain(m proto.Message, extra ...plainjson.Field) error {
	b, err := plainjson.Append(nil, m, extra...)
	if err != nil {
		return fmt.Errorf("encode event: %w", err)
	}
	return write(p.opts.Out, string(b)+"\n")
}

func (p *Printer) timeField(t *timestamppb.Timestamp) plainjson.Field {
	value := ""
	if t.IsValid() {
		value = t.AsTime().Format(time.RFC3339Nano)
	}
	return plainjson.Field{Name: "time", Value: value}
}
