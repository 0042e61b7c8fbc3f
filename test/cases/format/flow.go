// SPDX-License-Identifier: Apache-2.0

package format

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// Verdicts.
const (
	Allow        = "allow"
	Deny         = "deny"
	Redirect     = "redirect"
	AuthRequired = "auth-required"
)

// Protocols, as cases write them.
const (
	TCP    = "TCP"
	UDP    = "UDP"
	SCTP   = "SCTP"
	ICMPv4 = "ICMP"
	ICMPv6 = "ICMPv6"
)

// EndKind says what an end of a flow is.
type EndKind int

// Kinds of ends.
const (
	PodEnd EndKind = iota
	AddressEnd
	NodeEnd
	EntityEnd
	ServiceEnd
)

// End is an end of a flow.
type End struct {
	Kind EndKind
	// Name is "namespace/name" of a pod or service, the name of a node or entity.
	Name string
	// Addr of an AddressEnd.
	Addr netip.Addr
}

var entities = []string{"health", "ingress", "init", "unmanaged"}

// ParseEnd reads an end.
func ParseEnd(text string) (End, error) {
	kind, rest, found := strings.Cut(text, ":")
	switch {
	case found && kind == "ip":
		a, err := netip.ParseAddr(rest)
		if err != nil || a.Zone() != "" {
			return End{}, fmt.Errorf("expected an address, got %q", text)
		}
		return End{AddressEnd, rest, a.Unmap()}, nil
	case found && kind == "node" && rest != "":
		return End{Kind: NodeEnd, Name: rest}, nil
	case found && kind == "entity":
		if !slices.Contains(entities, rest) {
			return End{}, fmt.Errorf("expected entity:%s, got %q", strings.Join(entities, "|"), text)
		}
		return End{Kind: EntityEnd, Name: rest}, nil
	case found && kind == "svc" && strings.Count(rest, "/") == 1:
		return End{Kind: ServiceEnd, Name: rest}, nil
	case !found && strings.Count(text, "/") == 1:
		return End{Kind: PodEnd, Name: text}, nil
	}
	return End{}, fmt.Errorf("expected namespace/pod, ip:ADDRESS, node:NAME, entity:NAME or svc:namespace/name, got %q", text)
}

// protocol is the canonical spelling; absent = TCP, or ICMP with a message.
func protocol(f Flow) string {
	switch strings.ToUpper(f.Protocol) {
	case "":
		if f.ICMP != nil {
			return ICMPv4
		}
		return TCP
	case "ICMP", "ICMPV4":
		return ICMPv4
	case "ICMPV6":
		return ICMPv6
	}
	return strings.ToUpper(f.Protocol)
}

func (c *Case) checkFlow(at string, f Flow) (errs []error) {
	fault := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	for key, text := range map[string]string{"from": f.From, "to": f.To} {
		end, err := ParseEnd(text)
		if err != nil {
			fault("%s.%s: %w", at, key, err)
			continue
		}
		if !c.exists(end) {
			fault("%s.%s: the case has no %s", at, key, text)
		}
		if end.Kind == ServiceEnd && key == "from" {
			fault("%s.from: a service sends nothing", at)
		}
	}
	switch f.Protocol {
	case TCP, UDP, SCTP:
		if f.ICMP != nil {
			fault("%s.icmp: not with protocol %s", at, f.Protocol)
		}
	case ICMPv4, ICMPv6:
		if f.ICMP != nil && (f.ICMP.Type < 0 || f.ICMP.Type > 255 || f.ICMP.Code < 0 || f.ICMP.Code > 255) {
			fault("%s.icmp: expected type and code of 0 to 255", at)
		}
	default:
		fault("%s.protocol: expected TCP, UDP, SCTP, ICMP or ICMPv6, got %q", at, f.Protocol)
	}
	if f.Port < 0 || f.Port > 65535 {
		fault("%s.port: expected 0 to 65535, got %d", at, f.Port)
	}
	return errs
}

func (c *Case) exists(e End) bool {
	switch e.Kind {
	case PodEnd:
		return c.Pod(e.Name) != nil
	case NodeEnd:
		return slices.ContainsFunc(c.Nodes, func(n Node) bool { return n.Name == e.Name })
	case ServiceEnd:
		return c.Service(e.Name) != nil
	}
	return true
}

// Pod returns the pod "namespace/name"; nil = there is none.
func (c *Case) Pod(name string) *Pod {
	for i := range c.Pods {
		if c.Pods[i].Namespace+"/"+c.Pods[i].Name == name {
			return &c.Pods[i]
		}
	}
	return nil
}

// Service returns the service "namespace/name"; nil = there is none.
func (c *Case) Service(name string) *Service {
	for i := range c.Services {
		if c.Services[i].Namespace+"/"+c.Services[i].Name == name {
			return &c.Services[i]
		}
	}
	return nil
}

// Connection finds the connection that reply_of or related_to mean: by name, position, or its flow; `true` = the one between the same ends. A flow that
// is not among the connections is one that lives all the time. No reference: nil.
func (c *Case) Connection(ref *yaml.Node, e *Expectation) (*Connection, error) {
	switch {
	case ref.Kind == 0 || ref.Tag == "!!null":
		return nil, nil
	case ref.Kind == yaml.MappingNode:
		var f Flow
		if err := strict(ref, &f); err != nil {
			return nil, err
		}
		f.Protocol = protocol(f)
		if errs := c.checkFlow("flow", f); len(errs) > 0 {
			return nil, errors.Join(errs...)
		}
		if found := c.find(f, e.At); found != nil {
			return found, nil
		}
		return &Connection{Flow: f, OpenAt: e.At}, nil
	case ref.Tag == "!!bool":
		for i := range c.Connections {
			if k := &c.Connections[i]; (k.From == e.To || k.From == e.From) && (k.To == e.From || k.To == e.To) {
				return k, nil
			}
		}
		return nil, fmt.Errorf("no connection between %s and %s", e.From, e.To)
	}
	for i := range c.Connections {
		if k := &c.Connections[i]; ref.Value == k.ID && k.ID != "" || ref.Value == k.Name && k.Name != "" || ref.Value == strconv.Itoa(i) {
			return k, nil
		}
	}
	return nil, fmt.Errorf("no connection %q", ref.Value)
}

// Live returns the connection that an expectation with `established` is about; one that the case does not list was always there.
func (c *Case) Live(e *Expectation) *Connection {
	if found := c.find(e.Flow, e.At); found != nil {
		return found
	}
	return &Connection{Flow: e.Flow}
}

// find returns the connection of a flow, preferably one that lives at that time.
func (c *Case) find(f Flow, at float64) *Connection {
	var found *Connection
	for i := range c.Connections {
		k := &c.Connections[i]
		if k.From != f.From || k.To != f.To || k.Port != f.Port || k.Protocol != f.Protocol {
			continue
		}
		if k.OpenAt <= at && (k.CloseAt == nil || *k.CloseAt > at) {
			return k
		}
		if found == nil {
			found = k
		}
	}
	return found
}

// strict decodes a mapping of which every key must be known. (A decoder's strictness ends at a node.)
func strict(n *yaml.Node, f *Flow) error {
	known := []string{"from", "to", "port", "protocol", "icmp"}
	for i := 0; i+1 < len(n.Content); i += 2 {
		if !slices.Contains(known, n.Content[i].Value) {
			return fmt.Errorf("line %d: key %s is not known", n.Content[i].Line, n.Content[i].Value)
		}
	}
	return n.Decode(f)
}
