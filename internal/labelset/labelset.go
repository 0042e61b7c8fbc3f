// SPDX-License-Identifier: Apache-2.0

// Package labelset is the one written form of a set of labels, `source:key=value`, which is what an
// identity number stands for.
package labelset

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Bounds of a set that comes from outside.
const (
	MaxLabels = 1024
	MaxBytes  = 64 << 10
)

// Set is a label set: sorted, without duplicates. Equal sets are equal slices. It is never changed.
type Set []string

// Key returns a text that is equal for equal sets only, for use as a map's key.
func (s Set) Key() string { return strings.Join(s, "\x00") }

// Equal reports whether two sets are the same.
func (s Set) Equal(o Set) bool { return slices.Equal(s, o) }

// Check reports the first fault of a set that comes from outside: empty, unsorted, repeated, too
// large, or with a label that Parse refuses.
func (s Set) Check() error {
	if len(s) == 0 {
		return errors.New("the label set is empty")
	}
	if len(s) > MaxLabels {
		return fmt.Errorf("the label set has %d labels, more than %d", len(s), MaxLabels)
	}
	size := 0
	for i, text := range s {
		if size += len(text); size > MaxBytes {
			return fmt.Errorf("the label set is larger than %d bytes", MaxBytes)
		}
		if _, err := Parse(text); err != nil {
			return err
		}
		if i == 0 {
			continue
		}
		switch strings.Compare(s[i-1], text) {
		case 0:
			return fmt.Errorf("label %.200q is repeated", text)
		case 1:
			return fmt.Errorf("label %.200q is not in order", text)
		}
	}
	return nil
}

// Label is one label of a set.
type Label struct {
	Source string
	Key    string
	Value  string
}

// String returns the written form.
func (l Label) String() string { return l.Source + ":" + l.Key + "=" + l.Value }

// Parse reads the written form of one label. The source ends at the first colon, the key at the
// first `=` after it; control characters are refused.
func Parse(s string) (Label, error) {
	if i := strings.IndexFunc(s, func(r rune) bool { return r < 0x20 || r == 0x7f || r == '\uFFFD' }); i >= 0 {
		return Label{}, fmt.Errorf("label %.200q has a character that is not printable", s)
	}
	source, rest, ok := strings.Cut(s, ":")
	if !ok || source == "" {
		return Label{}, fmt.Errorf("label %.200q has no source", s)
	}
	key, value, ok := strings.Cut(rest, "=")
	if !ok {
		return Label{}, fmt.Errorf("label %.200q has no value", s)
	}
	if key == "" {
		return Label{}, fmt.Errorf("label %.200q has no key", s)
	}
	return Label{Source: source, Key: key, Value: value}, nil
}
