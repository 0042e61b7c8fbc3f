// SPDX-License-Identifier: Apache-2.0

package differential

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/weirmesh/weir/internal/policy"
)

// Documents are written around what is wrong with them.
const (
	inCNP   = `{apiVersion: cilium.io/v2, kind: CiliumNetworkPolicy, metadata: {name: p, namespace: shop}, spec: {endpointSelector: {}, %s}}`
	inSpec  = `{apiVersion: cilium.io/v2, kind: CiliumNetworkPolicy, metadata: {name: p, namespace: shop}, spec: {%s}}`
	inCCNP  = `{apiVersion: cilium.io/v2, kind: CiliumClusterwideNetworkPolicy, metadata: {name: p}, spec: {%s}}`
	inPorts = `{apiVersion: cilium.io/v2, kind: CiliumNetworkPolicy, metadata: {name: p, namespace: shop}, spec: {endpointSelector: {}, egress: [{toPorts: [%s]}]}}`
	inHTTP  = `{apiVersion: cilium.io/v2, kind: CiliumNetworkPolicy, metadata: {name: p, namespace: shop}, spec: {endpointSelector: {}, ingress: [{toPorts: [{ports: [{port: "80", protocol: TCP}], rules: {http: [%s]}}]}]}}`
	inKNP   = `{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: p, namespace: shop}, spec: {%s}}`
	inTier  = `{apiVersion: policy.networking.k8s.io/v1alpha2, kind: ClusterNetworkPolicy, metadata: {name: p}, spec: {%s}}`
	inRule  = `{apiVersion: policy.networking.k8s.io/v1alpha2, kind: ClusterNetworkPolicy, metadata: {name: p}, spec: {tier: Admin, priority: 1, subject: {namespaces: {}}, egress: [%s]}}`
	inGroup = `{apiVersion: cilium.io/v2, kind: CiliumCIDRGroup, metadata: {name: p}, spec: %s}`
	raw     = `%s`
)

var malformed = []struct {
	frame, text string
	field       string // the error's field begins so
	message     string // part of the error's message
}{
	// No document, or no policy.
	{raw, `{`, "", ""},
	{raw, ``, "", ""},
	{raw, `[]`, "", ""},
	{raw, `null`, "", ""},
	{raw, "a: b\n---\nc: d", "", ""},
	{raw, "kind: CiliumNetworkPolicy\nspec: {}\nspec: {}", "", ""},
	{raw, `"text"`, "", ""},
	{raw, `{apiVersion: v1, kind: Pod, metadata: {name: p}}`, "", "Pod"},
	{raw, `{apiVersion: cilium.io/v3, kind: CiliumNetworkPolicy, metadata: {name: p, namespace: shop}, spec: {endpointSelector: {}, ingress: [{}]}}`, "apiVersion", "cilium.io/v3"},
	{raw, `{apiVersion: cilium.io/v2, metadata: {name: p, namespace: shop}, spec: {endpointSelector: {}, ingress: [{}]}}`, "", "kind"},

	// The object.
	{raw, `{apiVersion: cilium.io/v2, kind: CiliumNetworkPolicy, metadata: {namespace: shop}, spec: {endpointSelector: {}, ingress: [{}]}}`, "metadata.name", "CiliumNetworkPolicy must have name"},
	{raw, `{apiVersion: cilium.io/v2, kind: CiliumNetworkPolicy, metadata: {name: p, namespace: shop}}`, "spec", "Invalid CiliumNetworkPolicy spec(s): empty policy"},
	{raw, `{apiVersion: cilium.io/v2, kind: CiliumNetworkPolicy, metadata: {name: p, namespace: shop}, spec: null, specs: []}`, "spec", "empty policy"},
	{raw, `{apiVersion: cilium.io/v2, kind: CiliumNetworkPolicy, metadata: {name: p, namespace: shop}, specs: [{endpointSelector: {}, ingress: [{}]}, {endpointSelector: {}, ingress: [{fromEntities: [x]}]}]}`, "specs[1].ingress[0].fromEntities[0]", "unsupported entity: x"},
	{raw, `{apiVersion: cilium.io/v2, kind: CiliumNetworkPolicy, metadata: {name: p, namespace: shop}, spec: 7}`, "spec", ""},
	{raw, `{apiVersion: cilium.io/v2, kind: CiliumNetworkPolicy, metadata: [], spec: {endpointSelector: {}, ingress: [{}]}}`, "metadata", ""},
	{inSpec, `ingress: [{}]`, "spec", "rule must have one of EndpointSelector or NodeSelector"},
	{inCCNP, `endpointSelector: {}, nodeSelector: {}, ingress: [{}]`, "spec", "rule cannot have both EndpointSelector and NodeSelector"},
	{inSpec, `nodeSelector: {}, ingress: [{}]`, "spec.nodeSelector", "rule cannot have NodeSelector"},
	{inSpec, `endpointSelector: {}`, "spec", "rule must have at least one of Ingress, IngressDeny, Egress, EgressDeny"},
	{inSpec, `endpointSelector: {}, ingress: [], egressDeny: []`, "spec", "rule must have at least one of Ingress, IngressDeny, Egress, EgressDeny"},
	{inCCNP, `ingress: [{}]`, "spec", "rule must have one of EndpointSelector or NodeSelector"},
	{inCNP, `ingress: {}`, "spec.ingress", ""},
	{inCNP, `ingress: [[]]`, "spec.ingress[0]", ""},
	{inCNP, `ingress: [{}], priority: 3`, "spec.priority", ""},
	{inCNP, `ingress: [{fromEndpoint: [{}]}]`, "spec.ingress[0].fromEndpoint", ""},
	{inCNP, `ingress: [{toEndpoints: [{}]}]`, "spec.ingress[0].toEndpoints", ""},
	{inCNP, `egress: [{}], enableDefaultDeny: {egress: "no"}`, "spec.enableDefaultDeny.egress", ""},
	{inCNP, `ingress: [{}], log: {value: "123456789012345678901234567890123"}`, "spec.log.value", ""},

	// Label selectors.
	{inSpec, `endpointSelector: {matchExpressions: [{key: app, operator: NotIn, values: []}]}, ingress: [{}]`, "spec.endpointSelector", "invalid label selector"},
	{inSpec, `endpointSelector: {matchExpressions: [{key: app, operator: In}]}, ingress: [{}]`, "spec.endpointSelector", "invalid label selector"},
	{inSpec, `endpointSelector: {matchExpressions: [{key: app, operator: Exists, values: [a]}]}, ingress: [{}]`, "spec.endpointSelector", "invalid label selector"},
	{inSpec, `endpointSelector: {matchExpressions: [{key: app, operator: in, values: [a]}]}, ingress: [{}]`, "spec.endpointSelector", "invalid label selector"},
	{inSpec, `endpointSelector: {matchExpressions: [{operator: Exists}]}, ingress: [{}]`, "spec.endpointSelector", "invalid label selector"},
	{inSpec, `endpointSelector: {matchLabels: {"a b": c}}, ingress: [{}]`, "spec.endpointSelector", "invalid label selector"},
	{inSpec, `endpointSelector: {matchLabels: {app: "a b"}}, ingress: [{}]`, "spec.endpointSelector", "invalid label selector"},
	{inSpec, `endpointSelector: {matchLabels: {app: [a]}}, ingress: [{}]`, "spec.endpointSelector", ""},
	{inSpec, `endpointSelector: {matchLabel: {app: a}}, ingress: [{}]`, "spec.endpointSelector.matchLabel", ""},
	{inCNP, `ingress: [{fromEndpoints: [{}, {matchExpressions: [{key: app, operator: DoesNotExist, values: [x]}]}]}]`, "spec.ingress[0].fromEndpoints[1]", "invalid label selector"},

	// Peers.
	{inCNP, `ingress: [{fromEndpoints: [{}], fromCIDR: [10.0.0.0/8]}]`, "spec.ingress[0]", "combining FromEndpoints and FromCIDR is not supported yet"},
	{inCNP, `ingress: [{fromEntities: [all], fromCIDRSet: [{cidr: 10.0.0.0/8}]}]`, "spec.ingress[0]", "is not supported yet"},
	{inCNP, `egress: [{toEntities: [all], toServices: [{k8sService: {serviceName: a}}]}]`, "spec.egress[0]", "is not supported yet"},
	{inCNP, `egressDeny: [{toEndpoints: [{}], toEntities: [all]}]`, "spec.egressDeny[0]", "is not supported yet"},
	{inCNP, `egress: [{toFQDNs: [{matchName: a.b}], toEntities: [world]}]`, "spec.egress[0]", "is not supported yet"},
	{inCNP, `egress: [{}, {toEntities: [world, everyone]}]`, "spec.egress[1].toEntities[1]", "unsupported entity: everyone"},
	{inCNP, `ingress: [{fromEntities: [World]}]`, "spec.ingress[0].fromEntities[0]", "unsupported entity: World"},
	{inCNP, `ingress: [{fromEntities: all}]`, "spec.ingress[0].fromEntities", ""},
	{inCNP, `ingress: [{fromCIDR: [""]}]`, "spec.ingress[0].fromCIDR[0]", "IP must be specified"},
	{inCNP, `ingress: [{fromCIDR: [10.0.0.0/33]}]`, "spec.ingress[0].fromCIDR[0]", "unable to parse CIDR"},
	{inCNP, `ingress: [{fromCIDR: [10.0.0]}]`, "spec.ingress[0].fromCIDR[0]", "unable to parse CIDR"},
	{inCNP, `ingress: [{fromCIDR: ["10.0.0.0/255.0.255.0"]}]`, "spec.ingress[0].fromCIDR[0]", "CIDR"},
	{inCNP, `egress: [{toCIDR: ["2001:db8::/129"]}]`, "spec.egress[0].toCIDR[0]", "unable to parse CIDR"},
	{inCNP, `egress: [{toCIDRSet: [{cidr: 10.0.0.1}]}]`, "spec.egress[0].toCIDRSet[0]", "unable to parse CIDRRule"},
	{inCNP, `egress: [{toCIDRSet: [{cidr: 10.0.0.0/8, except: [10.0.0.1]}]}]`, "spec.egress[0].toCIDRSet[0]", "unable to parse CIDRRule"},
	{inCNP, `egress: [{toCIDRSet: [{cidr: 10.0.0.0/16, except: [10.1.0.0/24]}]}]`, "spec.egress[0].toCIDRSet[0]", "allow CIDR prefix 10.0.0.0/16 does not contain exclude CIDR prefix 10.1.0.0/24"},
	{inCNP, `egress: [{toCIDRSet: [{cidr: 10.0.0.0/16, except: ["2001:db8::/32"]}]}]`, "spec.egress[0].toCIDRSet[0]", "does not contain exclude CIDR prefix"},
	{inCNP, `egress: [{toCIDRSet: [{cidr: 10.0.0.0/16, except: [10.0.0.0/8]}]}]`, "spec.egress[0].toCIDRSet[0]", "does not contain exclude CIDR prefix"},
	{inCNP, `egress: [{toCIDRSet: [{}]}]`, "spec.egress[0].toCIDRSet[0]", "one of cidr, cidrGroupRef, or cidrGroupSelector is required"},
	{inCNP, `egress: [{toCIDRSet: [{cidr: 10.0.0.0/8, cidrGroupRef: g}]}]`, "spec.egress[0].toCIDRSet[0]", "more than one of"},
	{inCNP, `ingress: [{fromNodes: [{}]}]`, "spec.ingress[0].fromNodes", `FromNodes/ToNodes rules can only be applied when the "enable-node-selector-labels" flag is set`},
	{inCNP, `ingress: [{fromRequires: [{matchLabels: {a: b}}]}]`, "spec.ingress[0].fromRequires", ""},
	{inCNP, `egressDeny: [{toFQDNs: [{matchName: a.b}]}]`, "spec.egressDeny[0].toFQDNs", ""},
	{inCNP, `egress: [{toFQDNs: [{}]}]`, "spec.egress[0].toFQDNs[0]", ""},
	{inCNP, `egress: [{toFQDNs: [{matchName: a.b, matchPattern: "*.b"}]}]`, "spec.egress[0].toFQDNs[0]", "only one of MatchName or MatchPattern is allowed in an FQDNSelector"},
	{inCNP, `egress: [{toFQDNs: [{matchName: "a b"}]}]`, "spec.egress[0].toFQDNs[0]", "Invalid characters in MatchName"},
	{inCNP, `egress: [{toFQDNs: [{matchPattern: "a[b]"}]}]`, "spec.egress[0].toFQDNs[0]", "Invalid characters in MatchPattern"},

	// Ports.
	{inPorts, `{ports: [{protocol: TCP}]}`, "spec.egress[0].toPorts[0].ports[0]", "port must be specified"},
	{inPorts, `{ports: [{port: ""}]}`, "spec.egress[0].toPorts[0].ports[0]", "port must be specified"},
	{inPorts, `{ports: [{port: "65536"}]}`, "spec.egress[0].toPorts[0].ports[0]", "unable to parse port"},
	{inPorts, `{ports: [{port: "-1"}]}`, "spec.egress[0].toPorts[0].ports[0]", "unable to parse port"},
	{inPorts, `{ports: [{port: "a--b"}]}`, "spec.egress[0].toPorts[0].ports[0]", "port"},
	{inPorts, `{ports: [{port: a-name-of-sixteen}]}`, "spec.egress[0].toPorts[0].ports[0]", "port"},
	{inPorts, `{ports: [{port: "80", protocol: ICMP}]}`, "spec.egress[0].toPorts[0].ports[0]", `invalid protocol "ICMP", must be {`},
	{inPorts, `{ports: [{port: "80", protocol: QUIC}]}`, "spec.egress[0].toPorts[0].ports[0]", `invalid protocol "QUIC", must be {`},
	{inPorts, `{ports: [{port: "80", endPort: 70000}]}`, "spec.egress[0].toPorts[0].ports[0]", ""},
	{inPorts, `{ports: [` + strings.Repeat(`{port: "80"}, `, 41) + `]}`, "spec.egress[0].toPorts[0]", "too many ports, the max is 40"},
	{inPorts, `{port: "80"}`, "spec.egress[0].toPorts[0].port", ""},

	// L7.
	{inPorts, `{ports: [{port: "80"}], rules: {http: [{}]}}`, "spec.egress[0].toPorts[0]", "L7 rules can only apply to TCP (not ANY) except for DNS rules"},
	{inPorts, `{ports: [{port: "80", protocol: UDP}], rules: {http: [{}]}}`, "spec.egress[0].toPorts[0]", "L7 rules can only apply to TCP (not UDP) except for DNS rules"},
	{inPorts, `{ports: [{port: "0", protocol: TCP}], rules: {http: [{}]}}`, "spec.egress[0].toPorts[0]", "L7 rules can not be used when a port is 0"},
	{inPorts, `{ports: [{port: "53", protocol: TCP}], rules: {dns: [{matchName: a.b}], http: [{}]}}`, "spec.egress[0].toPorts[0]", "multiple L7 protocol rule types specified in single rule"},
	{inPorts, `{ports: [{port: "53", endPort: 60, protocol: UDP}], rules: {dns: [{matchName: a.b}]}}`, "spec.egress[0].toPorts[0]", "DNS rules do not support port ranges"},
	{inPorts, `{ports: [{port: "443", protocol: TCP}], serverNames: [a.b], rules: {http: [{}]}}`, "spec.egress[0].toPorts[0]", "ServerNames are not allowed with L7 rules without TLS termination"},
	{inPorts, `{ports: [{port: "443", protocol: TCP}], serverNames: [""]}`, "spec.egress[0].toPorts[0].serverNames[0]", "empty server name is not allowed"},
	{inPorts, `{ports: [{port: "80", protocol: TCP}], rules: {l7: [{a: b}]}}`, "spec.egress[0].toPorts[0].rules", "'l7' may only be specified when a 'l7proto' is also specified"},
	{inPorts, `{ports: [{port: "53", protocol: SCTP}], rules: {dns: [{matchName: a.b}]}}`, "spec.egress[0].toPorts[0].ports[0].protocol", "DNS rules can only apply to TCP and UDP (not SCTP)"},
	{inPorts, `{ports: [{port: "0", protocol: UDP}], rules: {dns: [{matchName: a.b}]}}`, "spec.egress[0].toPorts[0]", "L7 rules can not be used when a port is 0"},
	{inPorts, `{rules: {dns: [{matchName: a.b}]}}`, "spec.egress[0].toPorts[0].rules.dns", "port 53 must be specified for DNS rules"},
	{inPorts, `{ports: [{port: "53"}], rules: {dns: [{matchName: "a*.b"}]}}`, "spec.egress[0].toPorts[0].rules.dns[0].matchName", "Invalid characters in MatchName"},
	{inPorts, `{ports: [{port: "53"}], rules: {dns: [{matchPattern: "a b"}]}}`, "spec.egress[0].toPorts[0].rules.dns[0].matchPattern", "Invalid characters in MatchPattern"},
	{inPorts, `{ports: [{port: "53"}], rules: {dns: [{matchPattern: "` + strings.Repeat("a", 256) + `"}]}}`, "spec.egress[0].toPorts[0].rules.dns[0].matchPattern", "longer than 255"},
	{inPorts, `{ports: [{port: "443", protocol: TCP}], serverNames: ["a b"]}`, "spec.egress[0].toPorts[0].serverNames[0]", "Invalid characters"},
	{inPorts, `{ports: [{port: "80", protocol: TCP}], listener: {name: l, envoyConfig: {name: c}}, rules: {http: [{}]}}`, "spec.egress[0].toPorts[0].listener", "Listener is not allowed with L7 rules (l)"},
	{inCNP, `egress: [{toFQDNs: [{matchName: a.b, matchPattern: "*.b"}]}]`, "spec.egress[0].toFQDNs[0]", "only one of MatchName or MatchPattern is allowed in an FQDNSelector"},
	{inCNP, `egress: [{toFQDNs: [{}]}]`, "spec.egress[0].toFQDNs[0]", "only one of MatchName or MatchPattern is allowed in an FQDNSelector"},
	{inCNP, `egress: [{toFQDNs: [{matchName: a.b}], toEntities: [world]}]`, "spec.egress[0]", "is not supported yet"},
	{inCNP, `egressDeny: [{toFQDNs: [{matchName: a.b}]}]`, "spec.egressDeny[0].toFQDNs", ""},
	{inCNP, `ingress: [{fromFQDNs: [{matchName: a.b}]}]`, "spec.ingress[0]", ""},
	{inHTTP, `{path: "*"}`, "spec.ingress[0].toPorts[0].rules.http[0]", "missing argument to repetition operator"},
	{inHTTP, `{method: "("}`, "spec.ingress[0].toPorts[0].rules.http[0]", "error parsing regexp"},
	{inHTTP, `{headerMatches: [{value: a}]}`, "spec.ingress[0].toPorts[0].rules.http[0]", "Header name missing"},
	{inHTTP, `{headerMatches: [{name: a, value: b, mismatch: DROP}]}`, "spec.ingress[0].toPorts[0].rules.http[0]", "Invalid header action: DROP"},
	{inHTTP, `{headerMatches: [{name: a, secret: {namespace: b}}]}`, "spec.ingress[0].toPorts[0].rules.http[0]", "Secret name missing"},
	{inHTTP, `{pathPrefix: /}`, "spec.ingress[0].toPorts[0].rules.http[0]", ""},
	{inCNP, `ingress: [{toPorts: [{ports: [{port: "53", protocol: UDP}], rules: {dns: [{matchName: a.b}]}}]}]`, "spec.ingress[0].toPorts[0]", "on ingress"},
	{inCNP, `ingress: [{toPorts: [{ports: [{port: "80", protocol: TCP}], listener: {name: l, envoyConfig: {name: c}}}]}]`, "spec.ingress[0].toPorts[0]", "Listener is not allowed on ingress"},
	{inCNP, `egressDeny: [{toPorts: [{ports: [{port: "80", protocol: TCP}], rules: {http: [{}]}}]}]`, "spec.egressDeny[0].toPorts[0].rules", ""},
	{inCCNP, `nodeSelector: {}, ingress: [{toPorts: [{ports: [{port: "80", protocol: TCP}], rules: {http: [{}]}}]}]`, "spec.ingress[0]", "L7 policy is not supported on host ingress yet"},
	{inCCNP, `nodeSelector: {}, egress: [{toPorts: [{ports: [{port: "80", protocol: TCP}], rules: {http: [{}]}}]}]`, "spec.egress[0]", "L7 protocol HTTP is not supported on host egress yet"},
	{inCNP, `ingress: [{authentication: {mode: sometimes}, fromEndpoints: [{}]}]`, "spec.ingress[0].authentication", ""},
	{inCNP, `ingressDeny: [{authentication: {mode: required}, fromEndpoints: [{}]}]`, "spec.ingressDeny[0].authentication", ""},

	// ICMP.
	{inCNP, `ingress: [{icmps: [{fields: [{type: 8}]}], toPorts: [{ports: [{port: "80"}]}]}]`, "spec.ingress[0]", "the ICMPs block may only be present without ToPorts"},
	{inCNP, `ingress: [{icmps: [{fields: [{type: Echoes}]}]}]`, "spec.ingress[0].icmps[0].fields[0]", "ICMP type Echoes not found in IPv4"},
	{inCNP, `ingress: [{icmps: [{fields: [{family: IPv6, type: Echo}]}]}]`, "spec.ingress[0].icmps[0].fields[0]", "ICMP type Echo not found in IPv6"},
	{inCNP, `ingress: [{icmps: [{fields: [{family: IPv5, type: 8}]}]}]`, "spec.ingress[0].icmps[0].fields[0]", "wrong family: IPv5"},
	{inCNP, `ingress: [{icmps: [{fields: [{type: 256}]}]}]`, "spec.ingress[0].icmps[0].fields[0]", ""},
	{inCNP, `ingress: [{icmps: [{fields: [{family: IPv4}]}]}]`, "spec.ingress[0].icmps[0].fields[0]", ""},
	{inCNP, `ingress: [{icmps: [{fields: [` + strings.Repeat(`{type: 8}, `, 41) + `]}]}]`, "spec.ingress[0].icmps[0]", "too many types, the max is 40"},

	// Kubernetes' own.
	{inKNP, `podSelector: {}, policyTypes: [Both]`, "spec.policyTypes[0]", ""},
	{inKNP, `podSelector: {}, egress: [{to: [{ipBlock: {cidr: 10.0.0.0}}]}]`, "spec.egress[0].to[0].ipBlock.cidr", ""},
	{inKNP, `podSelector: {}, egress: [{to: [{ipBlock: {cidr: 10.0.0.0/16, except: [10.1.0.0/24]}}]}]`, "spec.egress[0].to[0].ipBlock", ""},
	{inKNP, `podSelector: {}, egress: [{ports: [{port: 80, endPort: 79}]}]`, "spec.egress[0].ports[0].endPort", ""},
	{inKNP, `podSelector: {}, egress: [{ports: [{endPort: 79}]}]`, "spec.egress[0].ports[0]", ""},
	{inKNP, `podSelector: {}, egress: [{ports: [{port: http, endPort: 79}]}]`, "spec.egress[0].ports[0]", ""},
	{inKNP, `podSelector: {}, egress: [{ports: [{port: 0}]}]`, "spec.egress[0].ports[0].port", ""},
	{inKNP, `podSelector: {}, egress: [{ports: [{port: 80, protocol: ANY}]}]`, "spec.egress[0].ports[0].protocol", ""},
	{inKNP, `podSelector: {matchExpressions: [{key: a, operator: In, values: []}]}, ingress: [{}]`, "spec.podSelector", ""},
	{inKNP, `podSelector: {}, ingress: [{to: [{podSelector: {}}]}]`, "spec.ingress[0].to", ""},

	// Cluster-wide tiers and groups.
	{inTier, `priority: 1, subject: {namespaces: {}}, ingress: [{action: Deny, from: [{namespaces: {}}]}]`, "spec.tier", ""},
	{inTier, `tier: Top, priority: 1, subject: {namespaces: {}}, ingress: [{action: Deny, from: [{namespaces: {}}]}]`, "spec.tier", ""},
	{inTier, `tier: Admin, priority: 1001, subject: {namespaces: {}}, ingress: [{action: Deny, from: [{namespaces: {}}]}]`, "spec.priority", ""},
	{inTier, `tier: Admin, priority: 1, ingress: [{action: Deny, from: [{namespaces: {}}]}]`, "spec.subject", ""},
	{inTier, `tier: Admin, priority: 1, subject: {namespaces: {}, pods: {namespaceSelector: {}, podSelector: {}}}, ingress: []`, "spec.subject", ""},
	{inRule, `{action: Allow, to: [{namespaces: {}}]}`, "spec.egress[0].action", ""},
	{inRule, `{to: [{namespaces: {}}]}`, "spec.egress[0].action", ""},
	{inRule, `{action: Deny, to: []}`, "spec.egress[0].to", ""},
	{inRule, `{action: Deny, to: [{networks: [10.0.0.0/33]}]}`, "spec.egress[0].to[0].networks[0]", ""},
	{inRule, `{action: Deny, to: [{domainNames: [a.b]}]}`, "spec.egress[0].to[0].domainNames", ""},
	{inRule, `{action: Deny, to: [{namespaces: {}}], protocols: [{tcp: {destinationPort: {range: {start: 90, end: 80}}}}]}`, "spec.egress[0].protocols[0]", ""},
	{inRule, `{action: Deny, to: [{namespaces: {}}], protocols: [{tcp: {}, udp: {}}]}`, "spec.egress[0].protocols[0]", ""},
	{inRule, `{action: Deny, to: [{networks: [10.0.0.0/8]}], protocols: [{destinationNamedPort: http}]}`, "spec.egress[0]", ""},
	{raw, `{apiVersion: policy.networking.k8s.io/v1alpha1, kind: BaselineAdminNetworkPolicy, metadata: {name: p}, spec: {subject: {namespaces: {}}, ingress: [{action: Deny, from: [{namespaces: {}}]}]}}`, "metadata.name", ""},
	{raw, `{apiVersion: policy.networking.k8s.io/v1alpha1, kind: BaselineAdminNetworkPolicy, metadata: {name: default}, spec: {subject: {namespaces: {}}, ingress: [{action: Pass, from: [{namespaces: {}}]}]}}`, "spec.ingress[0].action", ""},
	{inGroup, `{externalCIDRs: [10.0.0.0/8, 10.0.0.0/40]}`, "spec.externalCIDRs[1]", ""},
	{inGroup, `{externalCIDR: [10.0.0.0/8]}`, "spec", ""},
}

// Each malformed or contradictory document gets an error that names the policy, the field, and what was expected.
func TestMalformed(t *testing.T) {
	if len(malformed) < 100 {
		t.Errorf("%d documents, want 100", len(malformed))
	}
	for _, c := range malformed {
		t.Run(c.text, func(t *testing.T) {
			document := fmt.Sprintf(c.frame, c.text)
			object, err := policy.Parse([]byte(document), policy.Options{})
			if err == nil {
				t.Fatalf("%s\nis valid, with rules %v", document, object.Rules)
			}
			var e *policy.Error
			if !errors.As(err, &e) {
				t.Fatalf("%s\n%T %v, want *policy.Error", document, err, err)
			}
			if e.NotYet {
				t.Errorf("%s\nis valid and not yet enforced: %v", document, e)
			}
			if !strings.HasPrefix(e.Field, c.field) {
				t.Errorf("%s\nfield %q, want %q: %v", document, e.Field, c.field, e)
			}
			if e.Message == "" || !strings.Contains(e.Message, c.message) {
				t.Errorf("%s\nmessage %q, want %q", document, e.Message, c.message)
			}
			if !strings.Contains(e.Error(), e.Message) || !strings.Contains(e.Error(), e.Field) {
				t.Errorf("%s\n%q does not hold field and message", document, e.Error())
			}
			if c.frame != raw && (e.Ref.Name != "p" || e.Ref.Kind == "" || !strings.Contains(e.Error(), "p")) {
				t.Errorf("%s\nerror names %+v", document, e.Ref)
			}
		})
	}
}
