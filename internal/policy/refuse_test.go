// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"errors"
	"strings"
	"testing"
)

// Documents by what varies in them.

func cnp(spec string) string {
	return "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: p, namespace: shop}\nspec: " + spec
}

func ccnp(spec string) string {
	return "apiVersion: cilium.io/v2\nkind: CiliumClusterwideNetworkPolicy\nmetadata: {name: p}\nspec: " + spec
}

func in(entry string) string     { return cnp("{endpointSelector: {}, ingress: [" + entry + "]}") }
func inDeny(entry string) string { return cnp("{endpointSelector: {}, ingressDeny: [" + entry + "]}") }
func out(entry string) string    { return cnp("{endpointSelector: {}, egress: [" + entry + "]}") }
func inPort(port string) string  { return in("{toPorts: [" + port + "]}") }
func outPort(port string) string { return out("{toPorts: [" + port + "]}") }
func http(rule string) string {
	return inPort(`{ports: [{port: "80", protocol: TCP}], rules: {http: [` + rule + `]}}`)
}
func dns(rule string) string {
	return outPort(`{ports: [{port: "53"}], rules: {dns: [` + rule + `]}}`)
}
func from(selector string) string { return in("{fromEndpoints: [" + selector + "]}") }
func knp(spec string) string {
	return "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p, namespace: shop}\nspec: " + spec
}
func knpPort(port string) string { return knp("{podSelector: {}, ingress: [{ports: [" + port + "]}]}") }
func cluster(spec string) string {
	return "apiVersion: policy.networking.k8s.io/v1alpha2\nkind: ClusterNetworkPolicy\nmetadata: {name: p}\nspec: " + spec
}
func clusterOut(rule string) string {
	return cluster("{tier: Admin, priority: 1, subject: {namespaces: {}}, egress: [" + rule + "]}")
}
func clusterPort(port string) string {
	return clusterOut("{action: Deny, to: [{namespaces: {}}], protocols: [" + port + "]}")
}
func admin(rule string) string {
	return "apiVersion: policy.networking.k8s.io/v1alpha1\nkind: AdminNetworkPolicy\nmetadata: {name: p}\n" +
		"spec: {priority: 5, subject: {namespaces: {}}, ingress: [" + rule + "]}"
}
func group(spec string) string {
	return "apiVersion: cilium.io/v2\nkind: CiliumCIDRGroup\nmetadata: {name: g}\nspec: " + spec
}
func listener(body string) string {
	return outPort(`{ports: [{port: "80", protocol: TCP}], listener: ` + body + `}`)
}

const (
	inCNP   = "Invalid CiliumNetworkPolicy spec: "
	inPath  = "spec.ingress[0]"
	outPath = "spec.egress[0]"
)

// refusals are documents that must be refused, with the field and a part of the message.
var refusals = []struct{ name, doc, field, message string }{
	// Documents.
	{"empty", "", "", "the document is not an object"},
	{"text", "hello", "", "the document is not an object"},
	{"list", "[]", "", "the document is not an object"},
	{"not yaml", "a: [", "", "the document cannot be read"},
	{"repeated key", cnp("{endpointSelector: {}, ingress: [{}], ingress: [{}]}"), "", "cannot be read"},
	{"repeated key in JSON", `{"kind":"CiliumNetworkPolicy","kind":"CiliumNetworkPolicy"}`, "", "cannot be read"},
	{"two documents", in("{}") + "\n---\n" + in("{}"), "", "more than one document"},
	{"deep", strings.Repeat("[", 100) + strings.Repeat("]", 100), "", "nested deeper"},
	{"no kind", "apiVersion: v1", "kind", `kind "" is not a policy`},
	{"other kind", "apiVersion: v1\nkind: Pod", "kind", `kind "Pod" is not a policy`},
	{"kind is a list", "kind: [a]", "kind", "kind must be a string, not a list"},
	{"other version", strings.Replace(in("{}"), "cilium.io/v2", "cilium.io/v9", 1), "apiVersion", `unsupported value "cilium.io/v9" of apiVersion: must be one of cilium.io/v2`},
	{"no name", "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {}\nspec: {}", "metadata.name", "CiliumNetworkPolicy must have name"},
	{"no metadata", "apiVersion: cilium.io/v2\nkind: CiliumClusterwideNetworkPolicy", "metadata.name", "CiliumClusterwideNetworkPolicy must have name"},
	{"metadata is a text", "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: x", "metadata", "metadata must be an object, not a string"},
	{"unknown top field", in("{}") + "\nextra: 1", "extra", `unknown field "extra"`},
	{"specs of a NetworkPolicy", knp("{}") + "\nspecs: []", "specs", `unknown field "specs"`},
	// Rule objects.
	{"no spec", strings.Replace(cnp(""), "spec: ", "", 1), "spec", "Invalid CiliumNetworkPolicy spec(s): empty policy"},
	{"empty specs", strings.Replace(cnp(""), "spec: ", "specs: []", 1), "spec", "Invalid CiliumNetworkPolicy spec(s): empty policy"},
	{"empty specs, cluster-wide", strings.Replace(ccnp(""), "spec: ", "specs: []", 1), "spec", "Invalid CiliumClusterwideNetworkPolicy spec(s): empty policy"},
	{"fault in specs", strings.Replace(cnp("[{endpointSelector: {}, ingress: [{}]}, {endpointSelector: {}}]"), "spec:", "specs:", 1), "specs[1]",
		"Invalid CiliumNetworkPolicy specs: rule must have at least one of Ingress, IngressDeny, Egress, EgressDeny"},
	{"null in specs", strings.Replace(cnp("[null]"), "spec:", "specs:", 1), "specs[0]", "rule must have one of EndpointSelector or NodeSelector"},
	{"spec is a list", cnp("[]"), "spec", "spec must be an object, not a list"},
	{"unknown field", cnp("{endpointSelector: {}, ingres: [{}]}"), "spec.ingres", inCNP + `unknown field "ingres"`},
	{"no selector", cnp("{ingress: [{}]}"), "spec", inCNP + "rule must have one of EndpointSelector or NodeSelector"},
	{"null selector", cnp("{endpointSelector: null, ingress: [{}]}"), "spec", "rule must have one of EndpointSelector or NodeSelector"},
	{"both selectors", ccnp("{endpointSelector: {}, nodeSelector: {}, ingress: [{}]}"), "spec.nodeSelector",
		"Invalid CiliumClusterwideNetworkPolicy spec: rule cannot have both EndpointSelector and NodeSelector"},
	{"both selectors in CNP", cnp("{endpointSelector: {}, nodeSelector: {}, ingress: [{}]}"), "spec.nodeSelector", inCNP + "rule cannot have both EndpointSelector and NodeSelector"},
	{"node selector in CNP", cnp("{nodeSelector: {}, ingress: [{}]}"), "spec.nodeSelector", inCNP + "rule cannot have NodeSelector"},
	{"no lists", cnp("{endpointSelector: {}}"), "spec", inCNP + "rule must have at least one of Ingress, IngressDeny, Egress, EgressDeny"},
	{"empty lists", cnp("{endpointSelector: {}, ingress: [], egressDeny: []}"), "spec", "rule must have at least one of"},
	{"ingress is an object", cnp("{endpointSelector: {}, ingress: {}}"), "spec.ingress", "ingress must be a list, not an object"},
	{"entry is a text", cnp("{endpointSelector: {}, ingress: [x]}"), "spec.ingress[0]", "ingress must be an object, not a string"},
	{"switch is a text", cnp(`{endpointSelector: {}, ingress: [{}], enableDefaultDeny: {ingress: "no"}}`), "spec.enableDefaultDeny.ingress", "must be true or false, not a string"},
	{"unknown switch", cnp(`{endpointSelector: {}, ingress: [{}], enableDefaultDeny: {all: true}}`), "spec.enableDefaultDeny.all", "unknown field"},
	{"switch of the other side", cnp(`{endpointSelector: {}, ingress: [{}], enableDefaultDeny: {egress: 1}}`), "spec.enableDefaultDeny.egress", "not a number"},
	{"long log", cnp(`{endpointSelector: {}, ingress: [{}], log: {value: "123456789012345678901234567890123"}}`), "spec.log.value", "at most 32 printable"},
	{"log with a bell", cnp(`{endpointSelector: {}, ingress: [{}], log: {value: "a\a"}}`), "spec.log.value", "printable"},
	{"label without key", cnp(`{endpointSelector: {}, ingress: [{}], labels: [{value: x}]}`), "spec.labels[0].key", "needs a key"},
	{"description is a number", cnp(`{endpointSelector: {}, ingress: [{}], description: 1}`), "spec.description", "must be a string"},
	// Selectors.
	{"bad operator", from("{matchExpressions: [{key: a, operator: Is}]}"), inPath + ".fromEndpoints[0].matchExpressions[0].operator", inCNP + "invalid label selector: "},
	{"no operator", from("{matchExpressions: [{key: a}]}"), inPath + ".fromEndpoints[0].matchExpressions[0].operator", "not a valid selector operator"},
	{"In without values", from("{matchExpressions: [{key: a, operator: In}]}"), inPath + ".fromEndpoints[0].matchExpressions[0].values", "invalid label selector: values: Required value"},
	{"NotIn with no values", cnp("{endpointSelector: {matchExpressions: [{key: a, operator: NotIn, values: []}]}, ingress: [{}]}"),
		"spec.endpointSelector.matchExpressions[0].values", "invalid label selector"},
	{"Exists with values", from("{matchExpressions: [{key: a, operator: Exists, values: [b]}]}"), inPath + ".fromEndpoints[0].matchExpressions[0].values", "Forbidden"},
	{"no key", from("{matchExpressions: [{operator: Exists}]}"), inPath + ".fromEndpoints[0].matchExpressions[0].key", "invalid label selector: key"},
	{"bad key", from(`{matchLabels: {"-a": b}}`), inPath + ".fromEndpoints[0].matchLabels[-a]", "invalid label selector: key"},
	{"two colons", from(`{matchLabels: {"k8s:a:b": c}}`), inPath + ".fromEndpoints[0].matchLabels[k8s:a:b]", "invalid label selector: key"},
	{"no source", from(`{matchLabels: {":a": c}}`), inPath + ".fromEndpoints[0].matchLabels[:a]", "invalid label selector: key"},
	{"bad key prefix", from(`{matchLabels: {"A.b/c": c}}`), inPath + ".fromEndpoints[0].matchLabels[A.b/c]", "prefix part"},
	{"long key", from(`{matchLabels: {` + strings.Repeat("a", 64) + `: c}}`), inPath + ".fromEndpoints[0].matchLabels[" + strings.Repeat("a", 64) + "]", "1 to 63 characters"},
	{"bad value", from(`{matchLabels: {a: "b c"}}`), inPath + ".fromEndpoints[0].matchLabels[a]", "invalid label selector: values"},
	{"long value", from(`{matchLabels: {a: ` + strings.Repeat("a", 64) + `}}`), inPath + ".fromEndpoints[0].matchLabels[a]", "at most 63"},
	{"bad value in a list", from(`{matchExpressions: [{key: a, operator: In, values: [b, _]}]}`), inPath + ".fromEndpoints[0].matchExpressions[0].values[1]", "invalid label selector"},
	{"value is a number", from(`{matchLabels: {a: 1}}`), inPath + ".fromEndpoints[0].matchLabels[a]", "must be a string, not a number"},
	{"labels are a list", from(`{matchLabels: [a]}`), inPath + ".fromEndpoints[0].matchLabels", "must be an object"},
	{"unknown selector field", from(`{matchLabel: {a: b}}`), inPath + ".fromEndpoints[0].matchLabel", `unknown field "matchLabel"`},
	// Peers.
	{"two peer kinds", in("{fromEndpoints: [{}], fromCIDR: [10.0.0.0/8]}"), inPath + ".fromCIDR", inCNP + "combining FromEndpoints and FromCIDR is not supported yet"},
	{"two CIDR kinds", in("{fromCIDR: [10.0.0.0/8], fromCIDRSet: [{cidr: 10.0.0.0/8}]}"), inPath + ".fromCIDRSet", "combining FromCIDR and FromCIDRSet is not supported yet"},
	{"entities and nodes", in("{fromEntities: [all], fromNodes: [{}]}"), inPath + ".fromNodes", "combining FromEntities and FromNodes is not supported yet"},
	{"services and endpoints", out("{toEndpoints: [{}], toServices: [{k8sService: {serviceName: x}}]}"), outPath + ".toServices", "combining ToEndpoints and ToServices is not supported yet"},
	{"names and entities", out("{toFQDNs: [{matchName: a.b}], toEntities: [world]}"), outPath + ".toFQDNs", "combining ToEntities and ToFQDNs is not supported yet"},
	{"groups and CIDRs", out("{toGroups: [{aws: {region: x}}], toCIDR: [10.0.0.0/8]}"), outPath + ".toGroups", "combining ToCIDR and ToGroups is not supported yet"},
	{"egress member on ingress", in("{toEndpoints: [{}]}"), inPath + ".toEndpoints", `unknown field "toEndpoints"`},
	{"names in a deny", cnp("{endpointSelector: {}, egressDeny: [{toFQDNs: [{matchName: a.b}]}]}"), "spec.egressDeny[0].toFQDNs", `unknown field "toFQDNs"`},
	{"authentication in a deny", inDeny("{authentication: {mode: disabled}}"), "spec.ingressDeny[0].authentication", "unknown field"},
	{"entity", in("{fromEntities: [all, everyone]}"), inPath + ".fromEntities[1]", inCNP + "unsupported entity: everyone"},
	{"entity in capitals", in("{fromEntities: [World]}"), inPath + ".fromEntities[0]", "unsupported entity: World"},
	{"requires", in("{fromRequires: [{}]}"), inPath + ".fromRequires", "must have at most 0 items"},
	{"requires on egress", out("{toRequires: [{}]}"), outPath + ".toRequires", "must have at most 0 items"},
	{"nodes without the option", in("{fromNodes: [{}]}"), inPath + ".fromNodes", `FromNodes/ToNodes rules can only be applied when the "enable-node-selector-labels" flag is set`},
	{"service without a form", out("{toServices: [{}]}"), outPath + ".toServices[0]", "one of k8sService or k8sServiceSelector is required"},
	{"service without a name", out("{toServices: [{k8sService: {namespace: x}}]}"), outPath + ".toServices[0].k8sService.serviceName", "serviceName must be specified"},
	{"service selector without one", out("{toServices: [{k8sServiceSelector: {namespace: x}}]}"), outPath + ".toServices[0].k8sServiceSelector.selector", "must be specified"},
	{"group of another provider", in("{fromGroups: [{gcp: {}}]}"), inPath + ".fromGroups[0].gcp", "unknown field"},
	{"group's ids", in("{fromGroups: [{aws: {securityGroupsIds: x}}]}"), inPath + ".fromGroups[0].aws.securityGroupsIds", "must be a list"},
	{"authentication mode", in("{fromEntities: [all], authentication: {mode: maybe}}"), inPath + ".authentication.mode", `unsupported value "maybe" of mode`},
	{"authentication without mode", in("{fromEntities: [all], authentication: {}}"), inPath + ".authentication.mode", "unsupported value"},
	// CIDRs.
	{"empty CIDR", in(`{fromCIDR: [""]}`), inPath + ".fromCIDR[0]", "IP must be specified"},
	{"null CIDR", in(`{fromCIDR: [null]}`), inPath + ".fromCIDR[0]", "IP must be specified"},
	{"bad CIDR", in("{fromCIDR: [10.0.0.0/33]}"), inPath + ".fromCIDR[0]", "unable to parse CIDR: "},
	{"name as CIDR", in("{fromCIDR: [10.0.0.0/8, example.com]}"), inPath + ".fromCIDR[1]", "unable to parse CIDR: "},
	{"mask with holes", in("{fromCIDR: [10.0.0.0/255.0.255.0]}"), inPath + ".fromCIDR[0]", "CIDR cannot specify non-contiguous mask"},
	{"zone", in(`{fromCIDR: ["fe80::1%eth0"]}`), inPath + ".fromCIDR[0]", "unable to parse CIDR"},
	{"CIDRSet without slash", in("{fromCIDRSet: [{cidr: 10.0.0.1}]}"), inPath + ".fromCIDRSet[0].cidr", `unable to parse CIDRRule "10.0.0.1": `},
	{"CIDRSet empty", in("{fromCIDRSet: [{}]}"), inPath + ".fromCIDRSet[0]", "one of cidr, cidrGroupRef, or cidrGroupSelector is required"},
	{"CIDRSet of two", in("{fromCIDRSet: [{cidr: 10.0.0.0/8, cidrGroupRef: g}]}"), inPath + ".fromCIDRSet[0]", "more than one of cidr, cidrGroupRef, or cidrGroupSelector may not be set"},
	{"except outside", out("{toCIDRSet: [{cidr: 10.0.0.0/16, except: [10.0.1.0/24, 10.1.0.0/24]}]}"), outPath + ".toCIDRSet[0].except[1]",
		"allow CIDR prefix 10.0.0.0/16 does not contain exclude CIDR prefix 10.1.0.0/24"},
	{"except of the other family", out(`{toCIDRSet: [{cidr: 0.0.0.0/0, except: ["::/0"]}]}`), outPath + ".toCIDRSet[0].except[0]", "does not contain exclude CIDR prefix"},
	{"except wider", out(`{toCIDRSet: [{cidr: 10.0.0.0/16, except: [10.0.0.0/8]}]}`), outPath + ".toCIDRSet[0].except[0]", "does not contain exclude CIDR prefix"},
	{"except without slash", out(`{toCIDRSet: [{cidr: 10.0.0.0/16, except: [10.0.0.1]}]}`), outPath + ".toCIDRSet[0].except[0]", "unable to parse CIDRRule"},
	{"group with a bad prefix", group("{externalCIDRs: [10.0.0.0/8, x]}"), "spec.externalCIDRs[1]", "Invalid CiliumCIDRGroup spec: unable to parse CIDR"},
	{"group without spec", strings.Replace(group(""), "spec: ", "", 1), "spec", "must be specified"},
	// Ports.
	{"no port", inPort("{ports: [{protocol: TCP}]}"), inPath + ".toPorts[0].ports[0].port", "port must be specified"},
	{"port too high", inPort(`{ports: [{port: "65536"}]}`), inPath + ".toPorts[0].ports[0].port", "unable to parse port: "},
	{"negative port", inPort(`{ports: [{port: "-1"}]}`), inPath + ".toPorts[0].ports[0].port", "unable to parse port: "},
	{"octal port", inPort(`{ports: [{port: "010"}]}`), inPath + ".toPorts[0].ports[0].port", "unable to parse port: "},
	{"bad name", inPort(`{ports: [{port: "a--b"}]}`), inPath + ".toPorts[0].ports[0].port", "unable to parse port: "},
	{"long name", inPort(`{ports: [{port: abcdefghijklmnop}]}`), inPath + ".toPorts[0].ports[0].port", "unable to parse port: "},
	{"port is a number", inPort(`{ports: [{port: 80}]}`), inPath + ".toPorts[0].ports[0].port", "port must be a string, not a number"},
	{"endPort is a text", inPort(`{ports: [{port: "80", endPort: "90"}]}`), inPath + ".toPorts[0].ports[0].endPort", "must be a number, not a string"},
	{"endPort too high", inPort(`{ports: [{port: "80", endPort: 70000}]}`), inPath + ".toPorts[0].ports[0].endPort", "from 0 to 65535, not 70000"},
	{"protocol", inPort(`{ports: [{port: "80", protocol: HTTP}]}`), inPath + ".toPorts[0].ports[0].protocol", `invalid protocol "HTTP", must be { tcp | udp | sctp | `},
	{"portless with a port", inPort(`{ports: [{port: "80", protocol: VRRP}]}`), inPath + ".toPorts[0].ports[0].port", "port must be empty or 0"},
	{"extended protocol", inPort(`{ports: [{protocol: igmp}]}`), inPath + ".toPorts[0].ports[0].protocol", "protocol igmp needs extended protocols"},
	{"too many ports", inPort(`{ports: [` + strings.Repeat(`{port: "1"},`, 40) + `{port: "1"}]}`), inPath + ".toPorts[0].ports", "too many ports, the max is 40"},
	{"unknown port field", inPort(`{ports: [{port: "80", proto: TCP}]}`), inPath + ".toPorts[0].ports[0].proto", "unknown field"},
	{"rules in a deny", inDeny(`{toPorts: [{ports: [{port: "80", protocol: TCP}], rules: {http: [{}]}}]}`), "spec.ingressDeny[0].toPorts[0].rules", "unknown field"},
	// ICMP.
	{"icmps and ports", in(`{icmps: [{fields: [{type: 8}]}], toPorts: [{ports: [{port: "80"}]}]}`), inPath + ".icmps", "the ICMPs block may only be present without ToPorts"},
	{"too many types", in(`{icmps: [{fields: [` + strings.Repeat("{type: 8},", 41) + `]}]}`), inPath + ".icmps[0].fields", "too many types, the max is 40"},
	{"family", in(`{icmps: [{fields: [{family: ipv4, type: 8}]}]}`), inPath + ".icmps[0].fields[0].family", "wrong family: ipv4"},
	{"type name", in(`{icmps: [{fields: [{type: Ping}]}]}`), inPath + ".icmps[0].fields[0].type", "ICMP type Ping not found in IPv4"},
	{"type of the other family", in(`{icmps: [{fields: [{family: IPv6, type: Photuris}]}]}`), inPath + ".icmps[0].fields[0].type", "ICMP type Photuris not found in IPv6"},
	{"type too high", in(`{icmps: [{fields: [{type: 256}]}]}`), inPath + ".icmps[0].fields[0].type", "ICMP type 256 not found in IPv4"},
	{"no type", in(`{icmps: [{fields: [{}]}]}`), inPath + ".icmps[0].fields[0].type", "must be a number from 0 to 255 or a name"},
	// L7.
	{"http on ANY", inPort(`{ports: [{port: "80"}], rules: {http: [{}]}}`), inPath + ".toPorts[0].ports[0].protocol", "L7 rules can only apply to TCP (not ANY) except for DNS rules"},
	{"http on UDP", inPort(`{ports: [{port: "80", protocol: UDP}], rules: {http: [{}]}}`), inPath + ".toPorts[0].ports[0].protocol", "L7 rules can only apply to TCP (not UDP)"},
	{"http on port 0", inPort(`{ports: [{port: "0", protocol: TCP}], rules: {http: [{}]}}`), inPath + ".toPorts[0].rules", "L7 rules can not be used when a port is 0"},
	{"mixed L7", outPort(`{ports: [{port: "53", protocol: TCP}], rules: {dns: [{matchName: a.b}], http: [{}]}}`), outPath + ".toPorts[0].rules", "multiple L7 protocol rule types specified in single rule"},
	{"L7 beside an empty list", inPort(`{ports: [{port: "53", protocol: TCP}], rules: {kafka: [], http: [{}]}}`), inPath + ".toPorts[0].rules", "multiple L7 protocol rule types"},
	{"unknown L7", inPort(`{ports: [{port: "53", protocol: TCP}], rules: {grpc: []}}`), inPath + ".toPorts[0].rules.grpc", "unknown field"},
	{"expression", http(`{path: "*"}`), inPath + ".toPorts[0].rules.http[0].path", "missing argument to repetition operator"},
	{"look-ahead", http(`{method: "(?=GET)"}`), inPath + ".toPorts[0].rules.http[0].method", "error parsing regexp"},
	{"host expression", http(`{}, {host: "["}`), inPath + ".toPorts[0].rules.http[1].host", "error parsing regexp"},
	{"header without name", http(`{headerMatches: [{value: x}]}`), inPath + ".toPorts[0].rules.http[0].headerMatches[0]", "Header name missing"},
	{"empty header", http(`{headers: [""]}`), inPath + ".toPorts[0].rules.http[0].headers[0]", "Header name missing"},
	{"header action", http(`{headerMatches: [{name: x, mismatch: DROP}]}`), inPath + ".toPorts[0].rules.http[0].headerMatches[0].mismatch", "Invalid header action: DROP"},
	{"header secret", http(`{headerMatches: [{name: x, secret: {namespace: other}}]}`), inPath + ".toPorts[0].rules.http[0].headerMatches[0].secret.name", "Secret name missing"},
	{"dns on ingress", inPort(`{ports: [{port: "53"}], rules: {dns: [{matchName: a.b}]}}`), inPath + ".toPorts[0].rules.dns", "L7 protocol DNS is not supported on ingress yet"},
	{"dns without ports", outPort(`{rules: {dns: [{matchName: a.b}]}}`), outPath + ".toPorts[0].rules.dns", "port 53 must be specified for DNS rules"},
	{"dns range", outPort(`{ports: [{port: "53", endPort: 54}], rules: {dns: [{matchName: a.b}]}}`), outPath + ".toPorts[0].ports[0].endPort", "DNS rules do not support port ranges"},
	{"dns name", dns(`{matchName: "a*.b"}`), outPath + ".toPorts[0].rules.dns[0].matchName", `Invalid characters in MatchName: "a*.b"`},
	{"dns pattern", dns(`{matchPattern: "a b"}`), outPath + ".toPorts[0].rules.dns[0].matchPattern", `Invalid characters in MatchPattern: "a b"`},
	{"dns name too long", dns(`{matchName: ` + strings.Repeat("a", 256) + `}`), outPath + ".toPorts[0].rules.dns[0].matchName", "longer than 255"},
	{"name and pattern", out(`{toFQDNs: [{matchName: a.b, matchPattern: "*.b"}]}`), outPath + ".toFQDNs[0]", "only one of MatchName or MatchPattern is allowed in an FQDNSelector"},
	{"neither name nor pattern", out(`{toFQDNs: [{}]}`), outPath + ".toFQDNs[0]", "only one of MatchName or MatchPattern"},
	{"server names with http", outPort(`{ports: [{port: "443", protocol: TCP}], serverNames: [a.b], rules: {http: [{}]}}`), outPath + ".toPorts[0].serverNames",
		"ServerNames are not allowed with L7 rules without TLS termination"},
	{"empty server name", outPort(`{ports: [{port: "443", protocol: TCP}], serverNames: [""]}`), outPath + ".toPorts[0].serverNames[0]", "empty server name is not allowed"},
	{"TLS without secret", outPort(`{ports: [{port: "443", protocol: TCP}], terminatingTLS: {}}`), outPath + ".toPorts[0].terminatingTLS.secret", "Secret name missing"},
	{"listener on ingress", inPort(`{ports: [{port: "80", protocol: TCP}], listener: {name: l, envoyConfig: {name: c}}}`), inPath + ".toPorts[0].listener", "Listener is not allowed on ingress (l)"},
	{"listener with rules", outPort(`{ports: [{port: "80", protocol: TCP}], rules: {http: [{}]}, listener: {name: l, envoyConfig: {name: c}}}`), outPath + ".toPorts[0].listener",
		"Listener is not allowed with L7 rules (l)"},
	{"listener of a namespace", strings.Replace(ccnp("{endpointSelector: {}, egress: ["), "[", `[{toPorts: [{ports: [{port: "80", protocol: TCP}], listener: {name: l, envoyConfig: {kind: CiliumEnvoyConfig, name: c}}}]}]}`, 1),
		outPath + ".toPorts[0].listener", `Listener "l" in CCNP can not use Kind CiliumEnvoyConfig`},
	{"listener's kind", listener(`{name: l, envoyConfig: {kind: Other, name: c}}`), outPath + ".toPorts[0].listener.envoyConfig.kind", "unsupported value"},
	{"listener's priority", listener(`{name: l, envoyConfig: {name: c}, priority: 101}`), outPath + ".toPorts[0].listener.priority", "from 1 to 100"},
	{"listener without config", listener(`{name: l}`), outPath + ".toPorts[0].listener.envoyConfig", "needs an envoyConfig"},
	{"l7 without l7proto", inPort(`{ports: [{port: "80", protocol: TCP}], rules: {l7: [{a: b}]}}`), inPath + ".toPorts[0].rules.l7", "'l7' may only be specified when a 'l7proto' is also specified"},
	{"l7 empty key", inPort(`{ports: [{port: "80", protocol: TCP}], rules: {l7proto: x, l7: [{"": b}]}}`), inPath + ".toPorts[0].rules.l7[0]", "Empty key not allowed"},
	{"kafka role and key", inPort(`{ports: [{port: "80", protocol: TCP}], rules: {kafka: [{role: produce, apiKey: fetch}]}}`), inPath + ".toPorts[0].rules.kafka[0].apiKey", "cannot set both Role and APIKey"},
	{"kafka topic", inPort(`{ports: [{port: "80", protocol: TCP}], rules: {kafka: [{topic: "a b"}]}}`), inPath + ".toPorts[0].rules.kafka[0].topic", "invalid Kafka Topic"},
	{"kafka version", inPort(`{ports: [{port: "80", protocol: TCP}], rules: {kafka: [{apiVersion: x}]}}`), inPath + ".toPorts[0].rules.kafka[0].apiVersion", "invalid Kafka APIVersion"},
	{"host ingress L7", ccnp(`{nodeSelector: {}, ingress: [{toPorts: [{ports: [{port: "80", protocol: TCP}], rules: {http: [{}]}}]}]}`), inPath + ".toPorts[0].rules", "L7 policy is not supported on host ingress yet"},
	{"host egress L7", ccnp(`{nodeSelector: {}, egress: [{toPorts: [{ports: [{port: "80", protocol: TCP}], rules: {http: [{}]}}]}]}`), outPath + ".toPorts[0].rules", "L7 protocol HTTP is not supported on host egress yet"},
	// NetworkPolicy.
	{"policy type", knp("{policyTypes: [Ingress, Both]}"), "spec.policyTypes[1]", `Invalid NetworkPolicy spec: unsupported value "Both" of policyTypes: must be one of Ingress, Egress`},
	{"unknown KNP field", knp("{podSelector: {}, ingress: [{fromEndpoints: [{}]}]}"), inPath + ".fromEndpoints", "unknown field"},
	{"KNP protocol", knpPort("{protocol: ICMP}"), inPath + ".ports[0].protocol", `unsupported value "ICMP"`},
	{"KNP port 0", knpPort("{port: 0}"), inPath + ".ports[0].port", "from 1 to 65535"},
	{"KNP port text", knpPort(`{port: "80"}`), inPath + ".ports[0].port", "at least one letter"},
	{"KNP endPort without port", knpPort("{endPort: 90}"), inPath + ".ports[0].endPort", "port is not specified or not a number"},
	{"KNP endPort with a name", knpPort("{port: web, endPort: 90}"), inPath + ".ports[0].endPort", "port is not specified or not a number"},
	{"KNP endPort below", knpPort("{port: 100, endPort: 90}"), inPath + ".ports[0].endPort", "greater than or equal"},
	{"KNP key with source", knp(`{podSelector: {matchLabels: {"k8s:a": b}}}`), "spec.podSelector.matchLabels[k8s:a]", "invalid label selector"},
	{"KNP block", knp("{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0}}]}]}"), inPath + ".from[0].ipBlock.cidr", "unable to parse CIDRRule"},
	{"KNP block's hole", knp("{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/16, except: [10.1.0.0/16]}}]}]}"), inPath + ".from[0].ipBlock.except[0]", "does not contain exclude"},
	{"KNP fault in an unlisted direction", knp("{policyTypes: [Ingress], egress: [{ports: [{port: 0}]}]}"), outPath + ".ports[0].port", "from 1 to 65535"},
	// ClusterNetworkPolicy and its elders.
	{"tier", cluster("{tier: Middle, priority: 1, subject: {namespaces: {}}}"), "spec.tier", `unsupported value "Middle" of tier: must be one of Admin, Baseline`},
	{"no priority", cluster("{tier: Admin, subject: {namespaces: {}}}"), "spec.priority", "priority must be specified"},
	{"priority", cluster("{tier: Admin, priority: 1001, subject: {namespaces: {}}}"), "spec.priority", "from 0 to 1000"},
	{"no subject", cluster("{tier: Admin, priority: 1}"), "spec.subject", "subject must be specified"},
	{"two subjects", cluster("{tier: Admin, priority: 1, subject: {namespaces: {}, pods: {}}}"), "spec.subject", "exactly one of namespaces, pods may be set"},
	{"action", clusterOut("{action: Allow, to: [{namespaces: {}}]}"), outPath + ".action", `unsupported value "Allow" of action: must be one of Accept, Deny, Pass`},
	{"no peers", clusterOut("{action: Deny}"), outPath + ".to", "to must have 1 to 25 items"},
	{"two peers in one", clusterOut("{action: Deny, to: [{namespaces: {}, networks: [10.0.0.0/8]}]}"), outPath + ".to[0]", "exactly one of"},
	{"pods without a selector", clusterOut("{action: Deny, to: [{pods: {podSelector: {}}}]}"), outPath + ".to[0].pods.namespaceSelector", "must be specified"},
	{"network", clusterOut("{action: Deny, to: [{networks: [10.0.0.0]}]}"), outPath + ".to[0].networks[0]", "unable to parse CIDRRule"},
	{"no networks", clusterOut("{action: Deny, to: [{networks: []}]}"), outPath + ".to[0].networks", "1 to 25 items"},
	{"named port with networks", clusterOut("{action: Deny, to: [{networks: [10.0.0.0/8]}], protocols: [{destinationNamedPort: web}]}"), outPath + ".to[0]", "cannot be combined with named ports"},
	{"denied names", clusterOut("{action: Deny, to: [{domainNames: [a.b]}]}"), outPath + ".to[0].domainNames", "only be used with action Accept"},
	{"too many rules", clusterOut(strings.TrimSuffix(strings.Repeat("{action: Deny, to: [{namespaces: {}}]},", 26), ",")), "spec.egress", "too many rules, the max is 25"},
	{"no protocol", clusterPort("{}"), outPath + ".protocols[0]", "exactly one of tcp, udp, sctp, destinationNamedPort must be set"},
	{"unknown protocol", clusterPort("{icmp: {}}"), outPath + ".protocols[0].icmp", "unknown field"},
	{"two protocols", clusterPort("{tcp: {}, udp: {}}"), outPath + ".protocols[0]", "exactly one of"},
	{"number and range", clusterPort("{tcp: {destinationPort: {number: 1, range: {start: 1, end: 2}}}}"), outPath + ".protocols[0].tcp.destinationPort", "exactly one of"},
	{"range backwards", clusterPort("{tcp: {destinationPort: {range: {start: 3, end: 3}}}}"), outPath + ".protocols[0].tcp.destinationPort.range", "start 3 must be less than end 3"},
	{"range without end", clusterPort("{tcp: {destinationPort: {range: {start: 3}}}}"), outPath + ".protocols[0].tcp.destinationPort.range.end", "must be specified"},
	{"ANP action", admin("{action: Accept, from: [{namespaces: {}}]}"), inPath + ".action", "must be one of Allow, Deny, Pass"},
	{"ANP port", admin("{action: Allow, from: [{namespaces: {}}], ports: [{portNumber: {protocol: TCP}}]}"), inPath + ".ports[0].portNumber.port", "must be specified"},
	{"ANP protocol", admin("{action: Allow, from: [{namespaces: {}}], ports: [{portNumber: {protocol: any, port: 1}}]}"), inPath + ".ports[0].portNumber.protocol", "must be one of TCP, UDP, SCTP"},
	{"BANP name", strings.Replace(strings.Replace(admin("{action: Allow, from: [{namespaces: {}}]}"), "AdminNetwork", "BaselineAdminNetwork", 1), "priority: 5, ", "", 1), "metadata.name", "the name must be default"},
	{"BANP Pass", strings.NewReplacer("AdminNetwork", "BaselineAdminNetwork", "priority: 5, ", "", "name: p", "name: default").Replace(admin("{action: Pass, from: [{namespaces: {}}]}")), inPath + ".action", "must be one of Allow, Deny"},
}

func TestRefuse(t *testing.T) {
	if len(refusals) < 100 {
		t.Errorf("%d documents", len(refusals))
	}
	for _, tt := range refusals {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Parse([]byte(tt.doc), Options{})
			var e *Error
			if !errors.As(err, &e) {
				t.Fatalf("%s\ngot %v, want an *Error with %q", tt.doc, err, tt.message)
			}
			if e.NotYet || e.Field != tt.field || !strings.Contains(e.Message, tt.message) {
				t.Errorf("%s\ngot field %q, message %q, not yet %t\nwant field %q, message %q", tt.doc, e.Field, e.Message, e.NotYet, tt.field, tt.message)
			}
		})
	}
}

// What is enforced now is taken.
func TestTaken(t *testing.T) {
	for name, doc := range map[string]string{
		"http": http("{}"), "dns": dns("{}"), "names": out(`{toFQDNs: [{matchName: a.b}]}`),
		"server names":      outPort(`{ports: [{port: "443", protocol: TCP}], serverNames: ["*.b"]}`),
		"server names in":   inPort(`{ports: [{port: "443", protocol: TCP}], serverNames: ["*.b"]}`),
		"header actions":    http("{headerMatches: [{name: a, value: b, mismatch: REPLACE}]}"),
		"no authentication": in("{fromEntities: [all], authentication: {mode: disabled}}"),
		"names of a node":   ccnp(`{nodeSelector: {}, egress: [{toFQDNs: [{matchPattern: "*.b"}]}]}`),
		"empty kafka":       inPort(`{ports: [{port: "80", protocol: TCP}], rules: {kafka: []}}`),
	} {
		if _, err := Parse([]byte(doc), Options{}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestNotYet(t *testing.T) {
	tests := []struct{ name, doc, field string }{
		{"secret", http("{headerMatches: [{name: a, secret: {name: b}}]}"), inPath + ".toPorts[0].rules.http[0].headerMatches[0].secret"},
		{"kafka", inPort(`{ports: [{port: "80", protocol: TCP}], rules: {kafka: [{topic: a}]}}`), inPath + ".toPorts[0].rules.kafka"},
		{"l7proto", inPort(`{ports: [{port: "80", protocol: TCP}], rules: {l7proto: x}}`), inPath + ".toPorts[0].rules.l7proto"},
		{"TLS", outPort(`{ports: [{port: "443", protocol: TCP}], originatingTLS: {secret: {name: x}}}`), outPath + ".toPorts[0].originatingTLS"},
		{"ended TLS", outPort(`{ports: [{port: "443", protocol: TCP}], serverNames: [a.b], terminatingTLS: {secret: {name: x}}, rules: {http: [{}]}}`), outPath + ".toPorts[0].terminatingTLS"},
		{"always failing", in("{fromEntities: [all], authentication: {mode: test-always-fail}}"), inPath + ".authentication.mode"},
		{"server names of a node", ccnp(`{nodeSelector: {}, egress: [{toPorts: [{ports: [{port: "443", protocol: TCP}], serverNames: [a.b]}]}]}`), outPath + ".toPorts[0].serverNames"},
		{"listener", listener(`{name: l, envoyConfig: {name: c}}`), outPath + ".toPorts[0].listener"},
		{"authentication", in("{fromEntities: [all], authentication: {mode: required}}"), inPath + ".authentication.mode"},
		{"domain names", clusterOut(`{action: Accept, to: [{domainNames: ["*.a.b"]}]}`), outPath + ".to[0].domainNames"},
		{"host DNS", ccnp(`{nodeSelector: {}, egress: [{toPorts: [{ports: [{port: "53"}], rules: {dns: [{}]}}]}]}`), outPath + ".toPorts[0].rules.dns"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Parse([]byte(tt.doc), Options{})
			var e *Error
			if !errors.As(err, &e) || !e.NotYet || e.Field != tt.field {
				t.Errorf("%s\ngot %+v, want field %q", tt.doc, err, tt.field)
			}
		})
	}
}
