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
	ID         string   `yaml:"id"`
	Title      string   `yaml:"title"`
	Area       []string `yaml:"area,flow"`
	Cluster    `yaml:",inline"`
	Validation []Validation `yaml:"validation,omitempty"`
	Expect     []Expect     `yaml:"expect"`
}

// Validation is an expected refusal.
type Validation struct {
	Policy string `yaml:"policy,omitempty"`
	Valid  *bool  `yaml:"valid,omitempty"`
}

// Expect is an expected verdict.
type Expect struct {
	From      string         `yaml:"from"`
	To        string         `yaml:"to"`
	Port      int            `yaml:"port,omitempty"`
	Protocol  string         `yaml:"protocol"`
	ICMP      *ICMP          `yaml:"icmp,omitempty,flow"`
	Verdict   string         `yaml:"verdict"`
	Direction string         `yaml:"direction,omitempty"`
	Reason    string         `yaml:"reason,omitempty"`
	Other     map[string]any `yaml:",inline"` // at, established, http, ...: what is more than a new connection
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
		out = append(out, c)
	}
	return out, nil
}

// NotYet returns the field of a policy object that is no part of L3/L4 (L7 rules, names, authentication, listeners), or "".
func NotYet(object map[string]any) string {
	var walk func(v any) string
	walk = func(v any) string {
		switch t := v.(type) {
		case map[string]any:
			for k, e := range t {
				switch k {
				case "rules", "toFQDNs", "serverNames", "terminatingTLS", "originatingTLS", "listener", "domainNames":
					return k
				case "authentication":
					if m, ok := e.(map[string]any); ok && m["mode"] != "disabled" {
						return k
					}
				}
				if found := walk(e); found != "" {
					return found
				}
			}
		case []any:
			for _, e := range t {
				if found := walk(e); found != "" {
					return found
				}
			}
		}
		return ""
	}
	return walk(object)
}
