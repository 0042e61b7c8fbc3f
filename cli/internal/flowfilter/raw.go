// SPDX-License-Identifier: Apache-2.0

package flowfilter

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/weirmesh/weir/gen/flow"
)

// ParseRaw reads the values of --allowlist or --denylist: each holds one or more FlowFilters as JSON.
func ParseRaw(values []string) ([]*flow.FlowFilter, error) {
	var out []*flow.FlowFilter
	for _, value := range values {
		dec := json.NewDecoder(strings.NewReader(value))
		for {
			var raw json.RawMessage
			err := dec.Decode(&raw)
			if errors.Is(err, io.EOF) {
				break
			}
			f := &flow.FlowFilter{}
			if err == nil {
				err = protojson.Unmarshal(raw, f)
			}
			if err != nil {
				return nil, fmt.Errorf("failed to decode '%v': %w", value, err)
			}
			out = append(out, f)
		}
	}
	return out, nil
}

// WriteRaw writes both lists as YAML, each filter as JSON that ParseRaw reads.
func WriteRaw(w io.Writer, allow, deny []*flow.FlowFilter) error {
	var b bytes.Buffer
	for _, l := range []struct {
		name    string
		filters []*flow.FlowFilter
	}{{"allowlist", allow}, {"denylist", deny}} {
		if len(l.filters) == 0 {
			continue
		}
		b.WriteString(l.name + ":\n")
		for _, f := range l.filters {
			text, err := JSON(f)
			if err != nil {
				return err
			}
			// In YAML's single quotes only the quote itself is special.
			b.WriteString("    - '" + strings.ReplaceAll(text, "'", "''") + "'\n")
		}
	}
	if b.Len() == 0 {
		b.WriteString("{}\n")
	}
	_, err := w.Write(b.Bytes())
	return err
}

// JSON is a filter as one line of JSON with proto field names.
func JSON(f *flow.FlowFilter) (string, error) {
	text, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(f)
	if err != nil {
		return "", fmt.Errorf("encode filter: %w", err)
	}
	var compact, escaped bytes.Buffer
	if err := json.Compact(&compact, text); err != nil {
		return "", fmt.Errorf("encode filter: %w", err)
	}
	json.HTMLEscape(&escaped, compact.Bytes())
	// What a terminal or YAML would not take as text stays an escape.
	var out strings.Builder
	for _, r := range escaped.String() {
		switch {
		case unicode.IsPrint(r):
			out.WriteRune(r)
		case r > 0xffff:
			hi, lo := (r-0x10000)>>10+0xd800, (r-0x10000)&0x3ff+0xdc00
			fmt.Fprintf(&out, `\u%04x\u%04x`, hi, lo)
		default:
			fmt.Fprintf(&out, `\u%04x`, r)
		}
	}
	return out.String(), nil
}
