// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"fmt"
	"slices"
)

// Error is why a policy object is not loaded.
type Error struct {
	Ref Ref
	// Field is the path, such as "spec.ingress[0].fromEntities[1]"; "" = the document.
	Field string
	// Message is the whole text for the object's status, such as "Invalid CiliumNetworkPolicy spec: unsupported entity: x" (spec 14).
	Message string
	// NotYet: the object is valid, but Weir does not enforce Field.
	NotYet bool
}

// Error names object and field before the message.
func (e *Error) Error() string {
	text := e.Message
	if e.Field != "" {
		text = e.Field + ": " + text
	}
	if e.Ref.Kind != "" {
		text = e.Ref.String() + ": " + text
	}
	return text
}

// policyKind is one kind of object that Parse reads.
type policyKind struct {
	versions   []string // apiVersion
	namespaced bool
	fields     []string // beside apiVersion, kind, metadata and status
}

func kinds() map[string]policyKind {
	cilium, cluster := []string{"cilium.io/v2"}, "policy.networking.k8s.io/"
	return map[string]policyKind{
		"NetworkPolicy":                  {[]string{"networking.k8s.io/v1"}, true, []string{"spec"}},
		"CiliumNetworkPolicy":            {cilium, true, []string{"spec", "specs"}},
		"CiliumClusterwideNetworkPolicy": {cilium, false, []string{"spec", "specs"}},
		"CiliumCIDRGroup":                {[]string{"cilium.io/v2", "cilium.io/v2alpha1"}, false, []string{"spec"}},
		"ClusterNetworkPolicy":           {[]string{cluster + "v1alpha2"}, false, []string{"spec"}},
		"AdminNetworkPolicy":             {[]string{cluster + "v1alpha1"}, false, []string{"spec"}},
		"BaselineAdminNetworkPolicy":     {[]string{cluster + "v1alpha1"}, false, []string{"spec"}},
	}
}

// Parse reads ONE policy object, as JSON or YAML, and validates it whole. The error is an *Error. An object that is valid but asks for something that is
// not enforced yet is an error too, with NotYet set: a policy that is half enforced is a hole.
func Parse(raw []byte, o Options) (*Object, error) {
	v, err := decode(raw)
	if err != nil {
		return nil, &Error{Message: fmt.Sprintf("the document cannot be read: %v", err)}
	}
	r := &reader{o: o}
	object := r.document(node{v: v})
	if r.err != nil {
		return nil, r.err
	}
	if err := notYet(object); err != nil {
		return nil, err
	}
	return object, nil
}

func (r *reader) document(doc node) *Object {
	if _, ok := doc.v.(map[string]any); !ok {
		r.fail(doc, "the document is not an object")
		return nil
	}
	kind := r.str(doc.child("kind"))
	known, ok := kinds()[kind]
	if !ok {
		r.fail(doc.child("kind"), "kind %q is not a policy", kind)
		return nil
	}
	r.ref.Kind = kind
	r.oneOf(doc.child("apiVersion"), r.str(doc.child("apiVersion")), known.versions...)
	meta := doc.child("metadata")
	if _, ok := meta.v.(map[string]any); !ok && !meta.absent() {
		r.wrongType(meta, "an object")
	}
	r.ref.Name, r.ref.UID = r.str(meta.child("name")), r.str(meta.child("uid"))
	if known.namespaced {
		r.ref.Namespace = r.str(meta.child("namespace"))
		if r.ref.Namespace == "" {
			r.ref.Namespace = "default"
		}
	}
	object := &Object{Generation: r.integer(meta.child("generation"), 0, 1<<62)}
	if r.ref.Name == "" {
		r.fail(meta.child("name"), "%s must have name", kind)
	}
	r.object(doc, append([]string{"apiVersion", "kind", "metadata", "status"}, known.fields...)...)
	object.Ref = r.ref
	if r.err != nil {
		return object
	}
	switch kind {
	case "NetworkPolicy":
		object.Rules = r.networkPolicy(doc)
	case "CiliumNetworkPolicy", "CiliumClusterwideNetworkPolicy":
		object.Rules = r.cilium(doc)
	case "CiliumCIDRGroup":
		object.CIDRGroup = r.cidrGroup(doc)
	default:
		object.Rules = r.clusterPolicy(doc)
	}
	object.Warnings = r.warnings
	return object
}

// notYet returns the error for the first member of a valid object that is parsed but not enforced.
func notYet(o *Object) error {
	for _, r := range o.Rules {
		field := ""
		switch {
		case len(r.FQDNs) > 0 && r.Tier != TierPolicy:
			field = r.fqdnPath
		case r.host && len(r.L7) > 0:
			field = r.L7[0].path
		case slices.ContainsFunc(r.L7, func(l *L7Ports) bool { return l.notYet != "" }):
			field = r.L7[slices.IndexFunc(r.L7, func(l *L7Ports) bool { return l.notYet != "" })].notYet
		case r.Authentication != "" && r.Authentication != "disabled":
			field = r.path + ".authentication.mode"
		default:
			continue
		}
		return &Error{Ref: o.Ref, Field: field, NotYet: true, Message: "the policy is valid, but Weir does not enforce " + field + " yet"}
	}
	return nil
}
