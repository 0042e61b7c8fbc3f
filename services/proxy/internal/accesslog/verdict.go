// SPDX-License-Identifier: Apache-2.0

package accesslog

import (
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	datav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"
)

// What RBAC filters leave in an entry's metadata.
const (
	rbacHTTP    = "envoy.filters.http.rbac"
	rbacNetwork = "envoy.filters.network.rbac"
)

// verdict is what an RBAC filter decided.
type verdict struct {
	policy      string
	denied, tcp bool
}

// metadata says it as Envoy's filters do: both as the shadow rules and as the enforced ones.
func (v verdict) metadata() *corev3.Metadata {
	result := "allowed"
	if v.denied {
		result = "denied"
	}
	filter := rbacHTTP
	if v.tcp {
		filter = rbacNetwork
	}
	values := map[string]*structpb.Value{
		"shadow_engine_result":   structpb.NewStringValue(result),
		"enforced_engine_result": structpb.NewStringValue(result),
	}
	if v.policy != "" {
		values["shadow_effective_policy_id"] = structpb.NewStringValue(v.policy)
		values["enforced_effective_policy_id"] = structpb.NewStringValue(v.policy)
	}
	return &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{filter: {Fields: values}}}
}

// setFlags sets response flags by Envoy's short names.
func setFlags(to *datav3.ResponseFlags, names []string) {
	for _, n := range names {
		switch n {
		case "LH":
			to.FailedLocalHealthcheck = true
		case "UH":
			to.NoHealthyUpstream = true
		case "UT":
			to.UpstreamRequestTimeout = true
		case "LR":
			to.LocalReset = true
		case "UR":
			to.UpstreamRemoteReset = true
		case "UF":
			to.UpstreamConnectionFailure = true
		case "UC":
			to.UpstreamConnectionTermination = true
		case "UO":
			to.UpstreamOverflow = true
		case "NR":
			to.NoRouteFound = true
		case "RL":
			to.RateLimited = true
		case "DC":
			to.DownstreamConnectionTermination = true
		case "URX":
			to.UpstreamRetryLimitExceeded = true
		case "SI":
			to.StreamIdleTimeout = true
		case "DPE":
			to.DownstreamProtocolError = true
		case "UPE":
			to.UpstreamProtocolError = true
		case "UMSDR":
			to.UpstreamMaxStreamDurationReached = true
		case "DT":
			to.DurationTimeout = true
		case "NC":
			to.NoClusterFound = true
		case "OM":
			to.OverloadManager = true
		case "IH":
			to.InvalidEnvoyRequestHeaders = true
		}
	}
}

// flagBytes is the encoded message of response flags, which few entries have.
func flagBytes(names []string) []byte {
	flags := &datav3.ResponseFlags{}
	setFlags(flags, names)
	b, err := proto.Marshal(flags)
	if err != nil {
		return nil // there are only truth values in it
	}
	return b
}
