// SPDX-License-Identifier: Apache-2.0

package format

import (
	"fmt"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// HTTP is a request.
type HTTP struct {
	Method, Path, Host string
	// Headers in their order, "Name: value".
	Headers []string
}

// DNS is a query.
type DNS struct{ Query, Type string }

// TLS begins with a server name; "" = without one.
type TLS struct{ SNI string }

// IsLayer7 reports whether an expectation says what is asked on the connection, or that a proxy is in the way.
func (e *Expectation) IsLayer7() bool {
	return e.HTTP.Kind != 0 || e.DNS.Kind != 0 || e.TLS.Kind != 0 || e.Verdict == Redirect
}

// Request is what is asked on the connection; without any of them nil, nil, nil.
func (e *Expectation) Request() (http *HTTP, dns *DNS, tls *TLS, err error) {
	if e.HTTP.Kind != 0 {
		if http, err = parseHTTP(&e.HTTP); err != nil {
			return nil, nil, nil, fmt.Errorf("http: %w", err)
		}
	}
	if e.DNS.Kind != 0 {
		var v struct {
			Query string `yaml:"query"`
			Name  string `yaml:"name"`
			Type  string `yaml:"type"`
		}
		if err := e.DNS.Decode(&v); err != nil {
			return nil, nil, nil, fmt.Errorf("dns: %w", err)
		}
		if v.Query == "" {
			v.Query = v.Name
		}
		dns = &DNS{v.Query, v.Type}
	}
	if e.TLS.Kind != 0 {
		var v struct {
			SNI string `yaml:"sni"`
		}
		if err := e.TLS.Decode(&v); err != nil {
			return nil, nil, nil, fmt.Errorf("tls: %w", err)
		}
		tls = &TLS{v.SNI}
	}
	return http, dns, tls, nil
}

func parseHTTP(n *yaml.Node) (*HTTP, error) {
	var v struct {
		Method  string    `yaml:"method"`
		Path    string    `yaml:"path"`
		Host    string    `yaml:"host"`
		Headers yaml.Node `yaml:"headers"`
	}
	if err := n.Decode(&v); err != nil {
		return nil, err
	}
	h := &HTTP{Method: v.Method, Path: v.Path, Host: v.Host}
	if h.Method == "" {
		h.Method = "GET"
	}
	if h.Path == "" {
		h.Path = "/"
	}
	var err error
	h.Headers, err = headers(&v.Headers)
	return h, err
}

// headers reads a mapping of names to a value or values, or a list of "Name: value" or {name, value}.
func headers(n *yaml.Node) ([]string, error) {
	var all []string
	switch n.Kind {
	case 0:
		return nil, nil
	case yaml.MappingNode:
		for i := 0; i+1 < len(n.Content); i += 2 {
			var values Strings
			if err := n.Content[i+1].Decode(&values); err != nil {
				return nil, fmt.Errorf("headers: %w", err)
			}
			for _, v := range values {
				all = append(all, n.Content[i].Value+": "+v)
			}
		}
		return all, nil
	case yaml.SequenceNode:
		for _, item := range n.Content {
			if item.Kind == yaml.ScalarNode {
				all = append(all, item.Value)
				continue
			}
			if item.Kind == yaml.MappingNode {
				var pair struct {
					Name  string `yaml:"name"`
					Value string `yaml:"value"`
				}
				if err := item.Decode(&pair); err != nil {
					return nil, fmt.Errorf("headers: %w", err)
				}
				if pair.Name != "" {
					all = append(all, pair.Name+": "+pair.Value)
					continue
				}
				more, err := headers(item)
				if err != nil {
					return nil, err
				}
				all = append(all, more...)
			}
		}
		return all, nil
	}
	return nil, fmt.Errorf("headers: expected a mapping or a list, at line %d", n.Line)
}

// Upstream are the headers that must reach the server: values by name, none = the header must not be there.
func (e *Expectation) Upstream() (map[string][]string, error) {
	n := &e.UpstreamHeaders
	switch n.Kind {
	case 0:
		return nil, nil
	case yaml.MappingNode:
		wanted := map[string][]string{}
		for i := 0; i+1 < len(n.Content); i += 2 {
			var values Strings
			if err := n.Content[i+1].Decode(&values); err != nil {
				return nil, fmt.Errorf("upstream_headers: %w", err)
			}
			wanted[n.Content[i].Value] = values
		}
		return wanted, nil
	}
	lines, err := headers(n)
	if err != nil {
		return nil, fmt.Errorf("upstream_headers: %w", err)
	}
	wanted := map[string][]string{}
	for _, line := range lines {
		name, value, _ := strings.Cut(line, ":")
		wanted[name] = append(wanted[name], strings.TrimSpace(value))
	}
	return wanted, nil
}

// scalarText of a scalar; "" = absent.
func scalarText(n *yaml.Node) string {
	if n.Kind == yaml.ScalarNode && n.Tag != "!!null" {
		return n.Value
	}
	return ""
}

// WantStatus is the HTTP status that a refusal must have; "" = nothing is said of it.
func (e *Expectation) WantStatus() string { return scalarText(&e.Status) }

// WantBody is the body that a refusal must have.
func (e *Expectation) WantBody() (string, bool) { return scalarText(&e.Body), e.Body.Kind != 0 }

// WantRCode is the code of a DNS answer, such as REFUSED; "" = nothing is said of it.
func (e *Expectation) WantRCode() string { return strings.ToUpper(scalarText(&e.RCode)) }

// HasTimes reports whether times are more than an order: names live as long as their TTL.
func (c *Case) HasTimes() bool { return len(c.DNSAnswers) > 0 }

// Times of everything that happens around names.
func (c *Case) nameTimes() []float64 {
	var all []float64
	for _, a := range c.DNSAnswers {
		all = append(all, a.At)
	}
	for _, k := range c.Connections {
		all = append(all, k.OpenAt)
		if k.CloseAt != nil {
			all = append(all, *k.CloseAt)
		}
	}
	return all
}

// AddTimes adds the times of names and connections to others, sorted, each once.
func (c *Case) AddTimes(times []float64) []float64 {
	if c.HasTimes() {
		times = append(times, c.nameTimes()...)
	}
	slices.Sort(times)
	return slices.Compact(times)
}
