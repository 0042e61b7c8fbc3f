// SPDX-License-Identifier: Apache-2.0

// Package render makes Envoy resources of filters, slots, services and Envoy configurations. It is pure: the same state gives the same bytes, whatever
// order it came in. A resource that can not be made, or that its own rules refuse, is left out alone and told as a Problem.
package render

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/weirmesh/weir/internal/expression"
)

// Type of a resource, in the order in which proxies should get them: what is named comes before what names it.
type Type uint8

// Types.
const (
	Cluster Type = iota
	Endpoint
	Listener
	Route
	numTypes
)

// Types are all of them, in order.
func Types() []Type { return []Type{Cluster, Endpoint, Listener, Route} }

// URL of the type in discovery requests.
func (t Type) URL() string {
	switch t {
	case Cluster:
		return "type.googleapis.com/envoy.config.cluster.v3.Cluster"
	case Endpoint:
		return "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
	case Listener:
		return "type.googleapis.com/envoy.config.listener.v3.Listener"
	case Route:
		return "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
	}
	return ""
}

// String is the type's short name, for people.
func (t Type) String() string {
	switch t {
	case Cluster:
		return "cluster"
	case Endpoint:
		return "endpoints"
	case Listener:
		return "listener"
	case Route:
		return "routes"
	}
	return "unknown"
}

// Resource is one resource. It is never changed; nodes share it.
type Resource struct {
	Type Type
	Name string
	// Owner is whom reports name: the key of a filter or of a configuration; "" = nobody's, such as endpoints.
	Owner string
	// Namespace of the tenant who pays for its size; "" = nobody.
	Namespace string
	// Instructions of all its regular expressions.
	Instructions int
	// Version is a hash of Body.
	Version string
	Body    *anypb.Any
}

// Problem is something that could not be rendered, or not in full.
type Problem struct {
	// Owner as in Resource.
	Owner string
	Error string
}

// MaxResource is the size of one resource; what is larger is left out.
const MaxResource = 4 << 20

// newResource checks and packs a resource.
func newResource(owner, namespace string, m proto.Message) (*Resource, error) {
	t, name, err := identify(m)
	if err != nil {
		return nil, err
	}
	if err := validate(string(m.ProtoReflect().Descriptor().Name()), m); err != nil {
		return nil, err
	}
	body := &anypb.Any{}
	if err := anypb.MarshalFrom(body, m, proto.MarshalOptions{Deterministic: true}); err != nil {
		return nil, fmt.Errorf("%s %s: %w", t, name, err)
	}
	if len(body.GetValue()) > MaxResource {
		return nil, fmt.Errorf("%s %s: %d bytes, more than %d", t, name, len(body.GetValue()), MaxResource)
	}
	instructions, err := expression.Cost(m)
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", t, name, err)
	}
	if instructions > expression.MaxInstructions {
		return nil, fmt.Errorf("%s %s: its regular expressions have more than %d instructions together", t, name, expression.MaxInstructions)
	}
	sum := sha256.Sum256(body.GetValue())
	return &Resource{
		Type: t, Name: name, Owner: owner, Namespace: namespace, Instructions: instructions, Version: hex.EncodeToString(sum[:8]), Body: body,
	}, nil
}

func identify(m proto.Message) (Type, string, error) {
	switch m := m.(type) {
	case *clusterv3.Cluster:
		return Cluster, m.GetName(), nil
	case *endpointv3.ClusterLoadAssignment:
		return Endpoint, m.GetClusterName(), nil
	case *listenerv3.Listener:
		return Listener, m.GetName(), nil
	case *routev3.RouteConfiguration:
		return Route, m.GetName(), nil
	}
	return 0, "", fmt.Errorf("%s is no resource", m.ProtoReflect().Descriptor().FullName())
}

// validate runs the rules of a message and of all that is packed in it.
func validate(path string, m proto.Message) error {
	if v, ok := m.(interface{ ValidateAll() error }); ok {
		if err := v.ValidateAll(); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	return packed(path, m.ProtoReflect())
}

// packed validates what stands in each Any below.
func packed(path string, r protoreflect.Message) error {
	if a, ok := r.Interface().(*anypb.Any); ok {
		inner, err := a.UnmarshalNew()
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		return validate(path, inner)
	}
	var err error
	each := func(name string, v protoreflect.Value) bool {
		err = packed(path+"."+name, v.Message())
		return err == nil
	}
	r.Range(func(field protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		name := string(field.Name())
		switch {
		case field.IsMap():
			if field.MapValue().Message() == nil {
				return true
			}
			v.Map().Range(func(key protoreflect.MapKey, item protoreflect.Value) bool {
				return each(fmt.Sprintf("%s[%q]", name, key.String()), item)
			})
		case field.Message() == nil:
		case field.IsList():
			for i := range v.List().Len() {
				if !each(fmt.Sprintf("%s[%d]", name, i), v.List().Get(i)) {
					break
				}
			}
		default:
			return each(name, v)
		}
		return err == nil
	})
	return err
}

// Set is the resources of one type by name.
type Set map[string]*Resource

// Names returns the names, sorted.
func (s Set) Names() []string {
	names := make([]string, 0, len(s))
	for name := range s {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// Version is a hash of names and contents: the same for the same resources, on every replica.
func (s Set) Version() string {
	h := sha256.New()
	for _, name := range s.Names() {
		fmt.Fprintf(h, "%s\x00%s\x00", name, s[name].Version)
	}
	return hex.EncodeToString(h.Sum(nil)[:8])
}

// Snapshot is what one node's proxy gets. It is never changed.
type Snapshot struct {
	Node string
	// Sets by type: what subscriptions to everything get, and those by name too.
	Sets [numTypes]Set
	// ByName are resources that only those get who ask for them by name: listeners of gRPC clients.
	ByName [numTypes]Set
	// Problems of resources that this node would have, sorted.
	Problems []Problem
	// Filters by the keys of the node's slots.
	Filters map[string]Filter
}

// Filter is what a proxy must have taken to have taken a filter: resources that are of its slot.
type Filter struct {
	// Revision is the policy service's.
	Revision  string
	Resources []*Resource
}

// Equal reports whether two snapshots have the same resources, by version and owner, and the same problems.
func (s *Snapshot) Equal(o *Snapshot) bool {
	if s == nil || o == nil {
		return s == o
	}
	same := func(a, b *Resource) bool { return a == b || a.Version == b.Version && a.Owner == b.Owner }
	for _, t := range Types() {
		if !maps.EqualFunc(s.Sets[t], o.Sets[t], same) || !maps.EqualFunc(s.ByName[t], o.ByName[t], same) {
			return false
		}
	}
	sameFilter := func(a, b Filter) bool {
		return a.Revision == b.Revision && slices.EqualFunc(a.Resources, b.Resources, same)
	}
	return slices.Equal(s.Problems, o.Problems) && maps.EqualFunc(s.Filters, o.Filters, sameFilter)
}

// Find returns a resource by name.
func (s *Snapshot) Find(t Type, name string) *Resource {
	if s == nil {
		return nil
	}
	if r, ok := s.Sets[t][name]; ok {
		return r
	}
	return s.ByName[t][name]
}
