// SPDX-License-Identifier: Apache-2.0

package reference

import (
	"fmt"
	"os"
	"path/filepath"

	"go.yaml.in/yaml/v3"
)

// Case is a file of the case folder, as far as the reference evaluator reads it.
type Case struct {
	ID          string   `yaml:"id"`
	Title       string   `yaml:"title"`
	Area        []string `yaml:"area,flow"`
	Cluster     `yaml:",inline"`
	DNSAnswers  []DNSAnswer  `yaml:"dns_answers,omitempty"`
	Connections []Connection `yaml:"connections,omitempty"`
	Changes     []Change     `yaml:"policy_changes,omitempty"`
	Validation  []Validation `yaml:"validation,omitempty"`
	Expect      []Expect     `yaml:"expect"`
}

// DNSAnswer is an answer that came back to a client; times are in seconds.
type DNSAnswer struct {
	Client string   `yaml:"client"`
	Name   string   `yaml:"name"`
	IPs    []string `yaml:"ips"`
	TTL    float64  `yaml:"ttl"`
	At     float64  `yaml:"at,omitempty"`
}

// Connection lives from OpenAt to CloseAt, or to the end.
type Connection struct {
	From    string   `yaml:"from"`
	To      string   `yaml:"to"`
	OpenAt  float64  `yaml:"open_at,omitempty"`
	CloseAt *float64 `yaml:"close_at,omitempty"`
}

// Change adds policies, in place of those of the same name, and removes some.
type Change struct {
	At     float64          `yaml:"at"`
	Add    []map[string]any `yaml:"add"`
	Remove []map[string]any `yaml:"remove,omitempty"`
}

// Validation is an expected refusal of an object, or of what objects say together of an endpoint.
type Validation struct {
	Policy   string `yaml:"policy,omitempty"`
	Valid    *bool  `yaml:"valid,omitempty"`
	Endpoint string `yaml:"endpoint,omitempty"`
}

// Expect is an expected verdict.
type Expect struct {
	From      string         `yaml:"from"`
	To        string         `yaml:"to"`
	Port      int            `yaml:"port,omitempty"`
	Protocol  string         `yaml:"protocol"`
	ICMP      *ICMP          `yaml:"icmp,omitempty,flow"`
	HTTP      *CaseHTTP      `yaml:"http,omitempty,flow"`
	DNS       *CaseDNS       `yaml:"dns,omitempty,flow"`
	TLS       *CaseTLS       `yaml:"tls,omitempty,flow"`
	At        float64        `yaml:"at,omitempty"`
	Verdict   string         `yaml:"verdict"`
	L7        string         `yaml:"l7,omitempty"`
	OrAllow   bool           `yaml:"or_allow,omitempty"`
	Direction string         `yaml:"direction,omitempty"`
	Upstream  map[string]any `yaml:"upstream_headers,omitempty"`
	Reason    string         `yaml:"reason,omitempty"`
	Other     map[string]any `yaml:",inline"` // established, reply_of, ...: what is more than a new connection
}

// CaseHTTP is a request as cases write it. Headers are a mapping of names to a value or values, or a list of "Name: value".
type CaseHTTP struct {
	Method  string `yaml:"method,omitempty"`
	Path    string `yaml:"path,omitempty"`
	Host    string `yaml:"host,omitempty"`
	Headers any    `yaml:"headers,omitempty"`
}

// CaseDNS is a query as cases write it.
type CaseDNS struct {
	Query string `yaml:"query"`
	Type  string `yaml:"type,omitempty"`
}

// CaseTLS is a handshake as cases write it.
type CaseTLS struct {
	SNI string `yaml:"sni,omitempty"`
}

// ICMP is a message.
type ICMP struct {
	Type int `yaml:"type"`
	Code int `yaml:"code,omitempty"`
}

// ReadCases reads all case files of a folder, by name.
func ReadCases(folder string) ([]*Case, error) {
	files, err := filepath.Glob(filepath.Join(folder, "*.yaml"))
	if err != nil {
		return nil, err
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("no case files in %q", folder)
	}
	var out []*Case
	for _, f := range files {
		raw, err := os.ReadFile(f)
		if err != nil {
			return nil, err
		}
		c := &Case{}
		if err := yaml.Unmarshal(raw, c); err != nil {
			return nil, fmt.Errorf("case %s: %w", filepath.Base(f), err)
		}
		c.defaultNamespaces()
		out = append(out, c)
	}
	return out, nil
}

// defaultNamespaces gives policies of a namespace that name none the one that an API server would.
func (c *Case) defaultNamespaces() {
	lists := [][]map[string]any{c.Policies}
	for _, change := range c.Changes {
		lists = append(lists, change.Add, change.Remove)
	}
	for _, list := range lists {
		for _, o := range list {
			meta, ok := o["metadata"].(map[string]any)
			if ok && meta["namespace"] == nil && (o["kind"] == "NetworkPolicy" || o["kind"] == "CiliumNetworkPolicy") {
				meta["namespace"] = "default"
			}
		}
	}
}

// NotYet returns the field of a policy object that no part of Weir enforces (TLS that ends in the proxy, Kafka, listeners, authentication, names of
// cluster-wide tiers, requests of nodes), or "".
func NotYet(object map[string]any) string {
	var walk func(v any, host bool) string
	walk = func(v any, host bool) string {
		switch t := v.(type) {
		case map[string]any:
			for k, e := range t {
				switch l, _ := e.([]any); k {
				case "terminatingTLS", "originatingTLS", "listener", "domainNames", "l7proto", "secret":
					return k
				case "kafka":
					if len(l) > 0 {
						return k
					}
				case "rules", "serverNames":
					if host {
						return k
					}
				case "authentication":
					if m, ok := e.(map[string]any); ok && m["mode"] != "disabled" {
						return k
					}
				}
				if found := walk(e, host || t["nodeSelector"] != nil); found != "" {
					return found
				}
			}
		case []any:
			for _, e := range t {
				if found := walk(e, host); found != "" {
					return found
				}
			}
		}
		return ""
	}
	return walk(object, false)
}
