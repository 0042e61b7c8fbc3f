// SPDX-License-Identifier: Apache-2.0

package proxy_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"strings"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"

	"github.com/weirmesh/weir/internal/spiffe"
)

// quoted is a text as JSON has it.
func quoted(s string) string {
	b, err := json.Marshal(s)
	if err != nil {
		return `""`
	}
	return string(b)
}

// tlsCluster makes a cluster whose server must have a name of our CA.
func (b *bench) tlsCluster(name, addr, ca, uri string) {
	b.t.Helper()
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		b.t.Fatal(err)
	}
	b.set(name, &clusterv3.Cluster{}, `{"name":%q,"type":"STATIC","load_assignment":{"cluster_name":%q,"endpoints":[{"lb_endpoints":[
		{"endpoint":{"address":{"socket_address":{"address":%q,"port_value":%s}}}}]}]},
		"transport_socket":{"name":"envoy.transport_sockets.tls","typed_config":{
			"@type":"type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext","sni":"up.example",
			"common_tls_context":{"validation_context":{"trusted_ca":{"inline_string":%s},
				"match_typed_subject_alt_names":[{"san_type":"URI","matcher":{"exact":%q}}]}}}}}`, name, name, host, port, quoted(ca), uri)
}

// terminator makes a listener that ends TLS, with a chain for each server name.
func (b *bench) terminator(name, addr string, files spiffe.Files, chains map[string]string) {
	b.t.Helper()
	read := func(path string) string {
		data, err := os.ReadFile(path)
		if err != nil {
			b.t.Fatal(err)
		}
		return quoted(string(data))
	}
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		b.t.Fatal(err)
	}
	var all []string
	for _, server := range slices.Sorted(maps.Keys(chains)) {
		all = append(all, fmt.Sprintf(`{"name":%q,"filter_chain_match":{"server_names":[%q],"transport_protocol":"tls"},
			"transport_socket":{"name":"envoy.transport_sockets.tls","typed_config":{
				"@type":"type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
				"common_tls_context":{"tls_certificates":[{"certificate_chain":{"inline_string":%s},"private_key":{"inline_string":%s}}]}}},
			"filters":[{"name":"envoy.filters.network.tcp_proxy","typed_config":{
				"@type":"type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy","stat_prefix":"x",
				"weighted_clusters":{"clusters":[{"name":%q,"weight":100}]}}}]}`, server, server, read(files.Cert), read(files.Key), chains[server]))
	}
	b.set(name, &listenerv3.Listener{}, `{"name":%q,"address":{"socket_address":{"address":%q,"port_value":%s}},
		"listener_filters":[{"name":"envoy.filters.listener.tls_inspector","typed_config":{
			"@type":"type.googleapis.com/envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector"}}],
		"filter_chains":[%s]}`, name, host, port, strings.Join(all, ","))
}
