// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"

	"github.com/weirmesh/weir/internal/spiffe"
	"github.com/weirmesh/weir/lab/internal/cluster"
	"github.com/weirmesh/weir/lab/internal/part"
)

// envoy is another proxy in the place of weir-proxy: an Envoy binary with a bootstrap that knows the xDS servers. It has no status socket of ours, so that
// nobody waits for it.
func (l *Lab) envoy(node cluster.NodeConfig, files spiffe.Files, folder string) (part.Definition, error) {
	bootstrap, err := l.envoyBootstrap(node.Name, files, filepath.Join(folder, "accesslog.sock"))
	if err != nil {
		return part.Definition{}, err
	}
	path := filepath.Join(folder, "envoy.json")
	if err := os.WriteFile(path, bootstrap, 0o600); err != nil {
		return part.Definition{}, fmt.Errorf("configure the proxy: %w", err)
	}
	args := []string{l.config.ProxyBinary, "--config-path", path, "--concurrency", "1", "--disable-hot-restart", "--log-level", "warning"}
	args = append(args, forNode(l.config.ProxyArgs, node.Name)...)
	return l.process("proxy/"+node.Name, l.config.nodeNetns(node.Name), args), nil
}

// envoyBootstrap is the whole of what Envoy is told; the rest comes by xDS.
func (l *Lab) envoyBootstrap(node string, files spiffe.Files, accessLog string) ([]byte, error) {
	type object = map[string]any
	var endpoints []any
	for n := range l.config.XDS {
		host, port, err := net.SplitHostPort(hostPort(l.config.central(n+1), xdsPort))
		if err != nil {
			return nil, fmt.Errorf("address of xDS: %w", err)
		}
		number, err := strconv.Atoi(port)
		if err != nil {
			return nil, fmt.Errorf("port of xDS: %w", err)
		}
		endpoints = append(endpoints, object{"endpoint": object{"address": object{"socket_address": object{"address": host, "port_value": number}}}})
	}
	ads := object{"ads": object{}, "resource_api_version": "V3"}
	file := func(path string) object { return object{"filename": path} }
	return json.MarshalIndent(object{
		"node": object{"id": node, "cluster": "weir", "metadata": object{"weir": object{"access_log": accessLog}}},
		"dynamic_resources": object{
			"lds_config": ads, "cds_config": ads,
			"ads_config": object{"api_type": "DELTA_GRPC", "transport_api_version": "V3", "grpc_services": []any{object{"envoy_grpc": object{"cluster_name": "weir-xds"}}}},
		},
		"static_resources": object{"clusters": []any{object{
			"name": "weir-xds", "type": "STATIC", "connect_timeout": "5s",
			"load_assignment": object{"cluster_name": "weir-xds", "endpoints": []any{object{"lb_endpoints": endpoints}}},
			"typed_extension_protocol_options": object{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": object{
				"@type":                "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
				"explicit_http_config": object{"http2_protocol_options": object{"connection_keepalive": object{"interval": "30s", "timeout": "5s"}}},
			}},
			"transport_socket": object{"name": "envoy.transport_sockets.tls", "typed_config": object{
				"@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
				"common_tls_context": object{
					"tls_params":       object{"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
					"alpn_protocols":   []string{"h2"},
					"tls_certificates": []any{object{"certificate_chain": file(files.Cert), "private_key": file(files.Key)}},
					"validation_context": object{
						"trusted_ca":                    file(files.CA),
						"match_typed_subject_alt_names": []any{object{"san_type": "URI", "matcher": object{"exact": "spiffe://" + trustDomain + "/weir/xds"}}},
					},
				},
			}},
		}}},
		"admin": object{"address": object{"socket_address": object{"address": "127.0.0.1", "port_value": 9901}}},
		// Regular expressions of policies may be longer programs than Envoy allows by itself.
		"layered_runtime": object{"layers": []any{object{
			"name": "weir", "static_layer": object{"re2.max_program_size.error_level": 100000, "re2.max_program_size.warn_level": 100000},
		}}},
	}, "", " ")
}
