// SPDX-License-Identifier: Apache-2.0

package control

import (
	"encoding/json"

	"google.golang.org/protobuf/types/known/timestamppb"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	labv1 "github.com/weirmesh/weir/gen/weir/lab/v1"
	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	"github.com/weirmesh/weir/lab/internal/cluster"
	"github.com/weirmesh/weir/lab/internal/object"
)

// policyMessages describes the policy objects. enforced is what the policy service says of them; empty = it was not heard.
func policyMessages(c *cluster.Cluster, enforced []*policyv1.PolicyObject) []*labv1.Policy {
	said := map[string]*policyv1.PolicyObject{}
	for _, policy := range enforced {
		said[policy.GetUid()] = policy
	}
	var messages []*labv1.Policy
	for _, raw := range cluster.List[*object.Raw](c) {
		message := policyMessage(raw)
		if policy := said[message.GetUid()]; policy != nil {
			message.EnforcedGeneration = policy.GetEnforcedGeneration()
			message.EnforcingNodes, message.Nodes = int32(policy.GetEnforcingNodes()), int32(policy.GetNodes())
		}
		messages = append(messages, message)
	}
	return messages
}

func policyMessage(raw *object.Raw) *labv1.Policy {
	message := &labv1.Policy{
		Kind: raw.Kind, Namespace: raw.Namespace, Name: raw.Name, Uid: string(raw.UID), Generation: raw.Generation,
		Created: timestamppb.New(raw.CreationTimestamp.Time),
	}
	var status struct {
		Conditions []metav1.Condition `json:"conditions"`
	}
	if len(raw.Status) == 0 {
		return message
	}
	if err := json.Unmarshal(raw.Status, &status); err != nil {
		message.Message = "its status cannot be read: " + err.Error()
		return message
	}
	for _, condition := range status.Conditions {
		if condition.Type == "Valid" {
			message.Valid, message.Message = string(condition.Status), condition.Message
		}
	}
	return message
}
