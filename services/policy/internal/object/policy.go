// SPDX-License-Identifier: Apache-2.0

package object

import (
	"bytes"
	"encoding/json"
	"errors"
	"slices"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Kinds of policy objects, and of what policies refer to.
const (
	KindNetworkPolicy              = "NetworkPolicy"
	KindCiliumNetworkPolicy        = "CiliumNetworkPolicy"
	KindCiliumClusterwide          = "CiliumClusterwideNetworkPolicy"
	KindCiliumCIDRGroup            = "CiliumCIDRGroup"
	KindClusterNetworkPolicy       = "ClusterNetworkPolicy"
	KindAdminNetworkPolicy         = "AdminNetworkPolicy"
	KindBaselineAdminNetworkPolicy = "BaselineAdminNetworkPolicy"
)

// PolicyKinds lists them.
func PolicyKinds() []string {
	return []string{
		KindNetworkPolicy, KindCiliumNetworkPolicy, KindCiliumClusterwide, KindCiliumCIDRGroup,
		KindClusterNetworkPolicy, KindAdminNetworkPolicy, KindBaselineAdminNetworkPolicy,
	}
}

// Kinds of Envoy configurations.
const (
	KindCiliumEnvoyConfig            = "CiliumEnvoyConfig"
	KindCiliumClusterwideEnvoyConfig = "CiliumClusterwideEnvoyConfig"
)

// EnvoyKinds lists them.
func EnvoyKinds() []string { return []string{KindCiliumEnvoyConfig, KindCiliumClusterwideEnvoyConfig} }

// IsEnvoy reports whether a kind is one of EnvoyKinds.
func IsEnvoy(kind string) bool { return slices.Contains(EnvoyKinds(), kind) }

// Policy is a policy object or an Envoy configuration as it came: what it means, and whether it is valid, is decided by who compiles policies.
type Policy struct {
	Kind, Namespace, Name, UID string
	Generation                 int64
	Created                    time.Time
	// Raw is the whole object as JSON.
	Raw []byte
	// Spec is what of it has meaning: all but status and metadata that does not matter. Equal texts mean the same policy.
	Spec string
	// Conditions are those of its status.
	Conditions []metav1.Condition
}

// Key implements Object.
func (p *Policy) Key() Key { return Key{Kind: p.Kind, Namespace: p.Namespace, Name: p.Name} }

// fromPolicy reads what every kind of policy has alike.
func fromPolicy(kind string, data []byte) (Object, error) {
	var all map[string]json.RawMessage
	if err := json.Unmarshal(data, &all); err != nil {
		return nil, err
	}
	var meta metav1.PartialObjectMetadata
	if err := json.Unmarshal(data, &meta); err != nil {
		return nil, err
	}
	p := &Policy{
		Kind: kind, Namespace: meta.Namespace, Name: meta.Name, UID: string(meta.UID), Generation: meta.Generation, Raw: bytes.Clone(data),
		Created: meta.CreationTimestamp.Time,
	}
	if p.Generation < 0 {
		return nil, errors.New("metadata.generation is negative")
	}
	var status struct {
		Conditions []metav1.Condition `json:"conditions"`
	}
	if raw, ok := all["status"]; ok && json.Unmarshal(raw, &status) == nil { // a status that cannot be read is written anew
		p.Conditions = status.Conditions
	}
	delete(all, "status")
	labels, err := json.Marshal(meta.Labels)
	if err != nil {
		return nil, err
	}
	all["metadata"] = labels
	spec, err := json.Marshal(all)
	if err != nil {
		return nil, err
	}
	p.Spec = string(spec)
	return p, nil
}
