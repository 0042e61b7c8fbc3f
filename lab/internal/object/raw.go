// SPDX-License-Identifier: Apache-2.0

package object

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Raw is an object whose content the lab hands on as it was given, empty and unknown fields included: what they mean is for Weir to say.
type Raw struct {
	metav1.TypeMeta
	metav1.ObjectMeta
	// Fields has the rest of the object as JSON by name: spec, specs, and whatever else was given; never status.
	Fields map[string]json.RawMessage
	// Status is the object's status as JSON; empty = none. It comes from Weir alone.
	Status json.RawMessage
}

// own are the fields that are not content.
var own = []string{"apiVersion", "kind", "metadata", "status"}

// NewRaw makes an object of JSON. Its status is left out: it is Weir's to write.
func NewRaw(data []byte) (*Raw, error) {
	fields := map[string]json.RawMessage{}
	if err := json.Unmarshal(data, &fields); err != nil {
		return nil, fmt.Errorf("read object: %w", err)
	}
	r := &Raw{Fields: fields}
	// Field by field: names count as they are written, which encoding/json does not mind for whole structs.
	for name, target := range map[string]any{"apiVersion": &r.APIVersion, "kind": &r.Kind, "metadata": &r.ObjectMeta} {
		if value, ok := fields[name]; ok {
			if err := json.Unmarshal(value, target); err != nil {
				return nil, fmt.Errorf("read %s: %w", name, err)
			}
		}
	}
	for _, name := range own {
		delete(fields, name)
	}
	return r, nil
}

// SameContent reports whether two objects say the same, metadata and status aside: then they are of one generation.
func (r *Raw) SameContent(other *Raw) bool {
	return r.APIVersion == other.APIVersion && maps.EqualFunc(r.Fields, other.Fields, func(a, b json.RawMessage) bool { return bytes.Equal(a, b) })
}

// MarshalJSON implements json.Marshaler.
func (r *Raw) MarshalJSON() ([]byte, error) {
	all := map[string]any{"apiVersion": r.APIVersion, "kind": r.Kind, "metadata": &r.ObjectMeta}
	for name, value := range r.Fields {
		all[name] = value
	}
	if len(r.Status) > 0 {
		all["status"] = r.Status
	}
	return json.Marshal(all)
}

// DeepCopy returns a copy that shares nothing that can change.
func (r *Raw) DeepCopy() *Raw {
	c := *r
	r.ObjectMeta.DeepCopyInto(&c.ObjectMeta)
	c.Fields = maps.Clone(r.Fields)
	return &c
}

// SetStatus returns a copy of an object with another status; nil = none. Every kind but Raw must be able to hold it.
func SetStatus(o Object, status json.RawMessage) (Object, error) {
	if raw, ok := o.(*Raw); ok {
		c := raw.DeepCopy()
		c.Status = status
		return c, nil
	}
	whole, err := fields(o)
	if err != nil {
		return nil, err
	}
	delete(whole, "status")
	if status != nil {
		whole["status"] = status
	}
	data, err := json.Marshal(whole)
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", KeyOf(o), err)
	}
	kind, _ := ByName(KindOf(o))
	changed := kind.New()
	if err := json.Unmarshal(data, changed); err != nil {
		return nil, fmt.Errorf("status of %s: %w", KeyOf(o), err)
	}
	return changed, nil
}

// StatusOf returns an object's status as JSON; nil = none.
func StatusOf(o Object) (json.RawMessage, error) {
	if raw, ok := o.(*Raw); ok {
		return raw.Status, nil
	}
	whole, err := fields(o)
	if err != nil {
		return nil, err
	}
	return whole["status"], nil
}

func fields(o Object) (map[string]json.RawMessage, error) {
	data, err := JSON(o)
	if err != nil {
		return nil, err
	}
	whole := map[string]json.RawMessage{}
	if err := json.Unmarshal(data, &whole); err != nil {
		return nil, fmt.Errorf("read %s: %w", KeyOf(o), err)
	}
	return whole, nil
}
