// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"testing"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3" // a type that the bootstrap names
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/weirmesh/weir/internal/spiffe"
)

// TestEnvoyBootstrap: what Envoy would be given is a bootstrap by its own rules, and trusts the xDS servers alone.
func TestEnvoyBootstrap(t *testing.T) {
	config := DefaultConfig()
	config.XDS = 2
	l := &Lab{config: config}
	raw, err := l.envoyBootstrap("node1", spiffe.Files{Cert: "/tls/p.crt", Key: "/tls/p.key", CA: "/tls/ca.crt"}, "/run/accesslog.sock")
	if err != nil {
		t.Fatal(err)
	}
	var b bootstrapv3.Bootstrap
	if err := protojson.Unmarshal(raw, &b); err != nil {
		t.Fatalf("%v\n%s", err, raw)
	}
	if err := b.ValidateAll(); err != nil {
		t.Errorf("%v\n%s", err, raw)
	}
	xds := b.GetStaticResources().GetClusters()[0]
	if n := len(xds.GetLoadAssignment().GetEndpoints()[0].GetLbEndpoints()); n != 2 {
		t.Errorf("%d xDS servers, want 2", n)
	}
	var tls tlsv3.UpstreamTlsContext
	if err := xds.GetTransportSocket().GetTypedConfig().UnmarshalTo(&tls); err != nil {
		t.Fatal(err)
	}
	if names := tls.GetCommonTlsContext().GetValidationContext().GetMatchTypedSubjectAltNames(); len(names) != 1 || names[0].GetMatcher().GetExact() != "spiffe://weir.lab/weir/xds" {
		t.Errorf("the server's name is %v", names)
	}
}
