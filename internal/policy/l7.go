// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"cmp"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// L7Ports are the members of one toPorts entry that act above L4.
type L7Ports struct {
	HTTP           []HTTPRule
	DNS            []NameSelector
	ServerNames    []string
	TerminatingTLS *TLSContext
	OriginatingTLS *TLSContext
	Listener       *Listener

	position int    // among the toPorts entries
	path     string // of the first member
	notYet   string // path of the first member that is not enforced yet
	rules    bool   // `rules` is there
	kafka    bool
	proto    string // l7proto
	types    int    // kinds of rules that are there, empty or not
}

// HTTPRule is one item of rules.http: all members match. Expressions match whole strings.
type HTTPRule struct {
	Method, Path, Host string
	Headers            []string
	HeaderMatches      []HeaderMatch
}

// HeaderMatch is one item of headerMatches. Mismatch is "", LOG, ADD, DELETE or REPLACE.
type HeaderMatch struct {
	Name, Value, Mismatch string
	Secret                *SecretRef
}

// SecretRef names a secret.
type SecretRef struct{ Namespace, Name string }

// NameSelector selects DNS names.
type NameSelector struct{ MatchName, MatchPattern string }

// TLSContext says with which secret TLS is ended or begun.
type TLSContext struct {
	Secret                             SecretRef
	TrustedCA, Certificate, PrivateKey string
}

// Listener names a listener of an Envoy configuration.
type Listener struct {
	Kind, Config, Name string
	Priority           int
}

func (l *L7Ports) empty() bool { return l.path == "" }

// restricts reports whether it has rules for requests.
func (l *L7Ports) restricts() bool {
	return len(l.HTTP) > 0 || len(l.DNS) > 0 || l.kafka || l.proto != ""
}

func (l *L7Ports) member(n node) {
	if l.path == "" {
		l.path = n.path
	}
}

// later notes a member that is not enforced yet.
func (l *L7Ports) later(n node) {
	l.member(n)
	if l.notYet == "" {
		l.notYet = n.path
	}
}

// l7 reads the members; checkL7 looks at them together with the ports.
func (r *reader) l7(n node, e *entryContext) *L7Ports {
	l := &L7Ports{}
	if e.deny {
		return l
	}
	rules := n.child("rules")
	if r.object(rules, "http", "dns", "kafka", "l7proto", "l7") {
		l.rules = true
		r.l7Rules(rules, l)
	}
	l.TerminatingTLS = r.tls(n.child("terminatingTLS"), l)
	l.OriginatingTLS = r.tls(n.child("originatingTLS"), l)
	names := n.child("serverNames")
	l.ServerNames, _ = r.strings(names)
	if len(l.ServerNames) > 0 {
		l.member(names)
	}
	for i, name := range l.ServerNames {
		at := node{path: names.path + "[" + itoa(i) + "]"}
		if name == "" {
			r.fail(at, "empty server name is not allowed")
		}
		r.characters(at, "ServerName", name, true)
	}
	l.Listener = r.listener(n.child("listener"), l)
	return l
}

func (r *reader) l7Rules(n node, l *L7Ports) {
	http, ok := r.items(n.child("http"), "method", "path", "host", "headers", "headerMatches")
	l.count(ok)
	for _, item := range http {
		h, secret := r.http(item)
		l.HTTP = append(l.HTTP, h)
		l.member(n.child("http"))
		if secret != "" {
			l.later(node{path: secret})
		}
	}
	dns, ok := r.items(n.child("dns"), "matchName", "matchPattern")
	l.count(ok)
	for _, item := range dns {
		l.DNS = append(l.DNS, r.name(item))
		l.member(n.child("dns"))
	}
	kafka, ok := r.items(n.child("kafka"), "role", "apiKey", "apiVersion", "clientID", "topic")
	l.count(ok)
	for _, item := range kafka {
		l.kafka = true
		r.kafka(item)
		l.later(n.child("kafka"))
	}
	l.proto = r.str(n.child("l7proto"))
	l.count(l.proto != "")
	if l.proto != "" {
		l.later(n.child("l7proto"))
	}
	pairs, ok := r.list(n.child("l7"))
	if ok && l.proto == "" {
		r.fail(n.child("l7"), "'l7' may only be specified when a 'l7proto' is also specified")
	}
	for _, item := range pairs {
		m, ok := item.v.(map[string]any)
		if !ok && !item.absent() {
			r.wrongType(item, "an object")
		}
		for _, k := range item.keys() {
			if k == "" {
				r.fail(item, "Empty key not allowed")
			}
			r.str(node{item.path + "[" + k + "]", m[k]})
		}
	}
}

func (l *L7Ports) count(present bool) {
	if present {
		l.types++
	}
}

// checkL7 checks what the members, the direction and the ports have to do with each other.
func (r *reader) checkL7(n node, l *L7Ports, e *entryContext, ports int, anyZero bool) {
	rules := n.child("rules")
	switch {
	case e.ingress() && len(l.DNS) > 0:
		r.fail(rules.child("dns"), "L7 protocol DNS is not supported on ingress yet")
	case e.host && e.ingress() && l.restricts():
		r.fail(rules, "L7 policy is not supported on host ingress yet")
	case e.host && l.restricts() && len(l.DNS) == 0:
		r.fail(rules, "L7 protocol %s is not supported on host egress yet", l.protocol())
	case len(l.ServerNames) > 0 && l.restricts() && l.TerminatingTLS == nil:
		r.fail(n.child("serverNames"), "ServerNames are not allowed with L7 rules without TLS termination")
	}
	if l.Listener != nil {
		at := n.child("listener")
		switch {
		case e.ingress():
			r.fail(at, "Listener is not allowed on ingress (%s)", l.Listener.Name)
		case l.rules:
			r.fail(at, "Listener is not allowed with L7 rules (%s)", l.Listener.Name)
		case r.ref.Namespace == "" && l.Listener.Kind == "CiliumEnvoyConfig":
			r.fail(at, "Listener %q in CCNP can not use Kind CiliumEnvoyConfig", l.Listener.Name)
		}
	}
	if !l.restricts() {
		return
	}
	switch {
	case anyZero:
		r.fail(rules, "L7 rules can not be used when a port is 0")
	case len(l.DNS) > 0 && ports == 0:
		r.fail(rules.child("dns"), "port 53 must be specified for DNS rules")
	case l.types > 1:
		r.fail(rules, "multiple L7 protocol rule types specified in single rule")
	}
}

func (l *L7Ports) protocol() string {
	switch {
	case len(l.HTTP) > 0:
		return "HTTP"
	case l.kafka:
		return "Kafka"
	default:
		return l.proto
	}
}

// http reads one item; secret is the path of the first secret in it.
func (r *reader) http(n node) (h HTTPRule, secret string) {
	h = HTTPRule{Method: r.expressionText(n.child("method")), Path: r.expressionText(n.child("path")), Host: r.expressionText(n.child("host"))}
	h.Headers, _ = r.strings(n.child("headers"))
	for i, text := range h.Headers {
		if name, _, _ := strings.Cut(text, " "); strings.TrimSuffix(name, ":") == "" {
			r.fail(node{path: n.child("headers").path + "[" + itoa(i) + "]"}, "Header name missing")
		}
	}
	matches, _ := r.items(n.child("headerMatches"), "name", "value", "mismatch", "secret")
	for _, item := range matches {
		m := HeaderMatch{Name: r.str(item.child("name")), Value: r.str(item.child("value")), Mismatch: r.str(item.child("mismatch"))}
		if m.Name == "" {
			r.fail(item, "Header name missing")
		}
		if !slices.Contains([]string{"", "LOG", "ADD", "DELETE", "REPLACE"}, m.Mismatch) {
			r.fail(item.child("mismatch"), "Invalid header action: %s", m.Mismatch)
		}
		if m.Secret = r.secret(item.child("secret")); m.Secret != nil {
			secret = cmp.Or(secret, item.child("secret").path)
		}
		h.HeaderMatches = append(h.HeaderMatches, m)
	}
	return h, secret
}

func (r *reader) expressionText(n node) string {
	text := r.str(n)
	if _, err := regexp.Compile(text); err != nil {
		r.fail(n, "%v", err)
	}
	return text
}

func (r *reader) secret(n node) *SecretRef {
	if !r.object(n, "namespace", "name") {
		return nil
	}
	s := &SecretRef{r.str(n.child("namespace")), r.str(n.child("name"))}
	if s.Name == "" {
		r.fail(n.child("name"), "Secret name missing")
	}
	return s
}

func (r *reader) tls(n node, l *L7Ports) *TLSContext {
	if !r.object(n, "secret", "trustedCA", "certificate", "privateKey") {
		return nil
	}
	l.later(n)
	t := &TLSContext{TrustedCA: r.str(n.child("trustedCA")), Certificate: r.str(n.child("certificate")), PrivateKey: r.str(n.child("privateKey"))}
	s := r.secret(n.child("secret"))
	if s == nil {
		r.fail(n.child("secret"), "Secret name missing")
		return t
	}
	t.Secret = *s
	return t
}

func (r *reader) listener(n node, l *L7Ports) *Listener {
	if !r.object(n, "envoyConfig", "name", "priority") {
		return nil
	}
	l.later(n)
	config := n.child("envoyConfig")
	if config.absent() {
		r.fail(config, "Listener needs an envoyConfig")
	}
	r.object(config, "kind", "name")
	result := &Listener{
		Kind: r.str(config.child("kind")), Config: r.str(config.child("name")), Name: r.str(n.child("name")),
		Priority: int(r.integer(n.child("priority"), 1, 100)),
	}
	if result.Kind != "" {
		r.oneOf(config.child("kind"), result.Kind, "CiliumEnvoyConfig", "CiliumClusterwideEnvoyConfig")
	}
	if result.Name == "" || result.Config == "" {
		r.fail(n, "Listener needs its name and that of its envoyConfig")
	}
	return result
}

// name reads an item of toFQDNs or rules.dns.
func (r *reader) name(n node) NameSelector {
	s := NameSelector{r.str(n.child("matchName")), r.str(n.child("matchPattern"))}
	r.characters(n.child("matchName"), "MatchName", s.MatchName, false)
	r.characters(n.child("matchPattern"), "MatchPattern", s.MatchPattern, true)
	return s
}

func (r *reader) characters(n node, what, text string, stars bool) {
	if len(text) > 255 {
		r.fail(n, "%s is longer than 255 characters", what)
	}
	for _, c := range text {
		switch {
		case c >= '0' && c <= '9', c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c == '-', c == '_', c == '.', stars && c == '*':
		default:
			also := ". and -"
			if stars {
				also = "., - and *"
			}
			r.fail(n, "Invalid characters in %s: %q. Only 0-9, a-z, A-Z and %s characters are allowed", what, text, also)
			return
		}
	}
}

func (r *reader) kafka(n node) {
	role, key, topic := strings.ToLower(r.str(n.child("role"))), r.str(n.child("apiKey")), r.str(n.child("topic"))
	switch {
	case role != "" && role != "produce" && role != "consume":
		r.fail(n.child("role"), "invalid Kafka role %s", role)
	case role != "" && key != "":
		r.fail(n.child("apiKey"), "cannot set both Role and APIKey in Kafka rule")
	}
	if version := r.str(n.child("apiVersion")); version != "" {
		if _, err := strconv.ParseInt(version, 10, 16); err != nil {
			r.fail(n.child("apiVersion"), "invalid Kafka APIVersion %q", version)
		}
	}
	r.str(n.child("clientID"))
	if len(topic) > 249 {
		r.fail(n.child("topic"), "kafka topic exceeds maximum len of 249")
	}
	if strings.ContainsFunc(topic, func(c rune) bool {
		return !(c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c == '-' || c == '_' || c == '.')
	}) {
		r.fail(n.child("topic"), "invalid Kafka Topic name %q", topic)
	}
}
