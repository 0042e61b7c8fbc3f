// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"errors"
	"fmt"
	"net"

	"github.com/spf13/pflag"

	"github.com/weirmesh/weir/internal/client"
	"github.com/weirmesh/weir/internal/flags"
	semantics "github.com/weirmesh/weir/internal/policy"
)

// Config is the configuration of a policy service.
type Config struct {
	flags.Common
	// Source is the address of the weir.source.v1 server that has the cluster's objects.
	Source string
	// Identity are the addresses of the identity broker's replicas.
	Identity []string
	Policy   Choices
	// StandIns lets annotations of a pod (weir.dev/cluster, weir.dev/reserved) make it stand for a pod of another cluster, or for an endpoint of a
	// reserved identity: for labs, since whoever may write pods then may be anybody. Default false.
	StandIns bool
	// Listeners, if not empty, are served with mutual TLS instead of Listen, which a process with several
	// network namespaces needs. The service closes them.
	Listeners []net.Listener
}

// Choices are the choices that change what policies mean. All replicas of a cluster must have the same.
type Choices struct {
	// Enforcement is default (endpoints that a policy selects), always or never; default "default".
	Enforcement string
	// Audit lets pass and tells what policy would drop; default false.
	Audit bool
	// AllowLocalhost is always (the local node may reach its pods) or policy (it needs a rule); default "always".
	AllowLocalhost string
	// HostFirewall enforces policies with a nodeSelector; default false: they are accepted and have no effect.
	HostFirewall bool
	// NodeSelectorLabels allows fromNodes and toNodes; default false.
	NodeSelectorLabels bool
	// DefaultLocalCluster: selectors that name no cluster mean the local one; default true.
	DefaultLocalCluster bool
	// CIDRMatchMode says what CIDR peers match beside what is outside of the cluster: nodes, pods, or both; default nothing.
	CIDRMatchMode []string
	// NonDefaultDeny honours enableDefaultDeny; default true.
	NonDefaultDeny bool
}

// DefaultConfig returns the defaults.
func DefaultConfig() Config {
	return Config{
		Common: flags.Default(":18001"),
		Policy: Choices{Enforcement: "default", AllowLocalhost: "always", DefaultLocalCluster: true, NonDefaultDeny: true},
	}
}

// Add adds the flags; the values that c holds are their defaults.
func (c *Config) Add(set *pflag.FlagSet) {
	c.Common.Add(set)
	set.StringVar(&c.Source, "source", c.Source, "`address` of the source of the cluster's objects")
	set.StringSliceVar(&c.Identity, "identity", c.Identity, "`addresses` of the identity broker's replicas")
	set.BoolVar(&c.StandIns, "stand-ins", c.StandIns, "pods may stand for ends of other clusters and reserved identities, by annotation: for labs")
	p := &c.Policy
	set.StringVar(&p.Enforcement, "policy-enforcement", p.Enforcement, "`mode`: default, always or never")
	set.BoolVar(&p.Audit, "policy-audit-mode", p.Audit, "let pass and tell what policy would drop")
	set.StringVar(&p.AllowLocalhost, "allow-localhost", p.AllowLocalhost, "the local node reaches its pods: always, or as `policy` says")
	set.BoolVar(&p.HostFirewall, "host-firewall", p.HostFirewall, "enforce policies with a nodeSelector")
	set.BoolVar(&p.NodeSelectorLabels, "enable-node-selector-labels", p.NodeSelectorLabels, "allow fromNodes and toNodes")
	set.BoolVar(&p.DefaultLocalCluster, "policy-default-local-cluster", p.DefaultLocalCluster, "selectors that name no cluster mean the local one")
	set.StringSliceVar(&p.CIDRMatchMode, "policy-cidr-match-mode", p.CIDRMatchMode, "CIDR peers match `nodes`, pods, or both, beside what is outside")
	set.BoolVar(&p.NonDefaultDeny, "enable-non-default-deny-policies", p.NonDefaultDeny, "honour enableDefaultDeny")
}

// Validate reports all faults joined.
func (c *Config) Validate() error {
	_, optionsErr := c.options()
	errs := []error{
		c.Common.Validate(),
		c.TLS.Validate(),
		client.CheckAddresses("source", nonEmpty(c.Source)),
		client.CheckAddresses("identity", c.Identity),
		optionsErr,
	}
	if c.Listen == "" && len(c.Listeners) == 0 {
		errs = append(errs, errors.New("listen is empty"))
	}
	return errors.Join(errs...)
}

// options returns what the semantics make of the flags.
func (c *Config) options() (semantics.Options, error) {
	p := c.Policy
	o := semantics.Options{
		ClusterName: c.ClusterName, AllClusters: !p.DefaultLocalCluster, Audit: p.Audit, HostFirewall: p.HostFirewall,
		NodeSelectorLabels: p.NodeSelectorLabels, AlwaysDefaultDeny: !p.NonDefaultDeny,
	}
	var errs []error
	switch p.Enforcement {
	case "default":
	case "always":
		o.Enforcement = semantics.ModeAlways
	case "never":
		o.Enforcement = semantics.ModeNever
	default:
		errs = append(errs, fmt.Errorf("policy-enforcement %q is not default, always or never", p.Enforcement))
	}
	switch p.AllowLocalhost {
	case "always":
	case "policy":
		o.LocalhostNeedsRule = true
	default:
		errs = append(errs, fmt.Errorf("allow-localhost %q is not always or policy", p.AllowLocalhost))
	}
	for _, mode := range p.CIDRMatchMode {
		switch mode {
		case "nodes":
			o.CIDRMatchesNodes = true
		case "pods":
			o.CIDRMatchesPods = true
		default:
			errs = append(errs, fmt.Errorf("policy-cidr-match-mode %q is not nodes or pods", mode))
		}
	}
	return o, errors.Join(errs...)
}

func nonEmpty(s string) []string {
	if s == "" {
		return nil
	}
	return []string{s}
}
