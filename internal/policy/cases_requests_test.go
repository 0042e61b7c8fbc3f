// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

// caseAnswer is an answer that came back to a client.
type caseAnswer struct {
	Client, Name string
	IPs          []netip.Addr
	TTL, At      float64
}

type caseConnection struct {
	From, To string
	OpenAt   float64  `json:"open_at"`
	CloseAt  *float64 `json:"close_at"`
}

// learntName is a name that a node knows of an address for some time.
type learntName struct {
	node, name string
	addr       netip.Addr
	from, to   float64
}

func visibilityOf(annotations map[string]string) []Visibility {
	text, ok := annotations[VisibilityAnnotation]
	if !ok {
		text = annotations[VisibilityAnnotationAlias]
	}
	v, err := ParseVisibility(text)
	if err != nil {
		return nil
	}
	return v
}

// remove drops the rules of an object's older version.
func (w *caseWorld) remove(ref Ref) {
	w.rules = slices.DeleteFunc(w.rules, func(r *Rule) bool {
		return r.Ref.Kind == ref.Kind && r.Ref.Namespace == ref.Namespace && r.Ref.Name == ref.Name
	})
}

func (w *caseWorld) unload(t *testing.T, raw []json.RawMessage) {
	for _, doc := range raw {
		var o struct {
			Kind     string
			Metadata caseMeta
		}
		if err := yaml.Unmarshal(doc, &o); err != nil {
			t.Fatal(err)
		}
		w.remove(Ref{Kind: o.Kind, Namespace: o.Metadata.Namespace, Name: o.Metadata.Name})
	}
}

// learn has nodes learn the answers between two times that their proxies saw, by the policies of that time.
func (w *caseWorld) learn(t *testing.T, from, to float64) {
	for _, a := range w.c.Answers {
		client := w.end(a.Client)
		if a.At < from || a.At >= to || client == nil || !w.seen(t, client, a.Name) {
			continue
		}
		for _, ip := range a.IPs {
			w.learnt = append(w.learnt, learntName{client.node, a.Name, ip, a.At, w.usedUntil(client.node, ip, a.At+max(a.TTL, w.c.Config.MinTTL))})
		}
	}
}

// seen reports whether some end answers DNS to the client through a proxy that lets the name pass.
func (w *caseWorld) seen(t *testing.T, client *end, name string) bool {
	servers := []*end{w.end("ip:8.8.8.8")}
	for _, e := range w.ends {
		if e != client {
			servers = append(servers, e)
		}
	}
	ports := []uint16{53}
	for _, r := range w.rules {
		for _, s := range r.ports.specs {
			if s.l7.kind() == FilterDNS && s.name == "" {
				ports = append(ports, s.first)
			}
		}
	}
	for _, server := range servers {
		for _, p := range server.ports {
			ports = append(ports, p.Port)
		}
		for _, port := range ports {
			for _, proto := range []uint8{UDP, TCP} {
				d := w.side(t, client, server, Egress, proto, port, false)
				if d.Verdict != Allow || d.Filter == nil || w.side(t, server, client, Ingress, proto, port, false).Verdict != Allow {
					continue
				}
				if _, ok := d.Filter.AcceptsDNS(name); ok {
					return true
				}
			}
		}
	}
	return false
}

// usedUntil is when an address loses a name: not while connections of the node use it.
func (w *caseWorld) usedUntil(node string, ip netip.Addr, until float64) float64 {
	for more := true; more; {
		more = false
		for _, c := range w.c.Connections {
			closes := 1e9
			if c.CloseAt != nil {
				closes = *c.CloseAt
			}
			if c.To == "ip:"+ip.String() && w.end(c.From).node == node && c.OpenAt < until && closes > until {
				until, more = closes, true
			}
		}
	}
	return until
}

func (w *caseWorld) namesOf(addr netip.Addr, node string) []string {
	var all []string
	for _, l := range w.learnt {
		if l.addr == addr && l.node == node && l.from <= w.at && w.at < l.to {
			all = append(all, l.name)
		}
	}
	return all
}

// passes reports whether a filter lets the request of an expectation pass.
func (x *caseExpect) passes(f *Filter) bool {
	ok := true
	switch {
	case f == nil:
	case x.DNS != nil:
		_, ok = f.AcceptsDNS(x.DNS.Query)
	case x.TLS != nil || f.Kind == FilterTLS:
		name := ""
		if x.TLS != nil {
			name = x.TLS.SNI
		}
		_, ok = f.AcceptsSNI(name, x.TLS != nil)
	case x.HTTP != nil:
		q := HTTPRequest{Method: x.HTTP.Method, Path: x.HTTP.Path, Host: x.HTTP.Host}
		if q.Method == "" {
			q.Method = "GET"
		}
		if q.Path == "" {
			q.Path = "/"
		}
		switch headers := x.HTTP.Headers.(type) {
		case map[string]any:
			for name, value := range headers {
				values, many := value.([]any)
				if !many {
					values = []any{value}
				}
				for _, v := range values {
					q.Headers = append(q.Headers, Header{name, fmt.Sprint(v)})
				}
			}
		case []any:
			for _, h := range headers {
				name, value, _ := strings.Cut(fmt.Sprint(h), ": ")
				q.Headers = append(q.Headers, Header{name, value})
			}
		}
		_, _, ok = f.AcceptsHTTP(q)
	}
	return ok
}
