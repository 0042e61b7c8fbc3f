// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// Config says what lab to build.
type Config struct {
	// Name tells labs of one machine apart; default "default". It is part of names of namespaces and folders: lower-case letters and
	// digits, so that no lab's names are the beginning of another's.
	Name string
	// Nodes is how many nodes the lab has, node1 and so on; default 0: exactly those that the manifests have, or 2 when they have none.
	Nodes int
	// Manifests are files and folders of Kubernetes manifests, which the lab follows; default none.
	Manifests []string
	// ObserverListen is where the observer's API is on the host; default 127.0.0.1:4245. Port 0 is any that is free.
	ObserverListen string
	// Separate runs each of the central services, and NATS, as a process of its own instead of all in one.
	Separate bool
	// Replicas of services, which need Separate when above 1; default 1 each.
	Policies, Brokers, Relays, XDS int
	// BinDir is where Weir's programs are; default: where weir-lab is.
	BinDir string
	// Self is the path of weir-lab; required.
	Self string
	// MTU of the fabric; default 1500.
	MTU int
	// Families are the address families of nodes, pods and services, the first one preferred; default IPv4 and IPv6.
	Families []corev1.IPFamily
	// ClusterName is what Weir's parts call the cluster; default "default".
	ClusterName string
	// AgentArgs are further arguments of the agents; "node1:--flag" is for one node only.
	AgentArgs []string
	// DNSArgs and ProxyArgs are the same for weir-dns and weir-proxy.
	DNSArgs, ProxyArgs []string
	// PolicyArgs and so on are further arguments of those services. Relay and observer need Separate for theirs.
	PolicyArgs, IdentityArgs, XDSArgs, RelayArgs, ObserverArgs []string
	// ProxyBinary is an Envoy that runs in the place of weir-proxy; default: weir-proxy.
	ProxyBinary string
	// LogLevel of Weir's parts; default info.
	LogLevel string
	// Timeout bounds the start: until Weir's parts are ready, and then until the pods are; default 60 s.
	Timeout time.Duration
	// LogToFile moves this process's standard output and error to the lab's own log as soon as that has a place; Output and the logger
	// of New may write there. It is for a process that runs in the background.
	LogToFile bool
	// Output gets what a person who starts a lab reads; default nothing.
	Output io.Writer
}

// DefaultConfig returns the defaults.
func DefaultConfig() Config {
	return Config{
		Name: "default", ObserverListen: "127.0.0.1:4245", Policies: 1, Brokers: 1, Relays: 1, XDS: 1, ClusterName: "default",
		Families: []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol},
		MTU:      1500, LogLevel: "info", Timeout: time.Minute, Output: io.Discard,
	}
}

var nameForm = regexp.MustCompile(`^[a-z0-9]{1,20}$`)

// CheckName reports a name that no lab can have.
func CheckName(name string) error {
	if !nameForm.MatchString(name) {
		return fmt.Errorf("name %q: expected 1 to 20 lower-case letters and digits", name)
	}
	return nil
}

// Limits of what one fabric and one machine hold.
const (
	maxNodes    = 100
	maxReplicas = 5
)

// Validate reports all faults joined.
func (c *Config) Validate() error {
	errs := []error{CheckName(c.Name)}
	if c.Nodes < 0 || c.Nodes > maxNodes {
		errs = append(errs, fmt.Errorf("nodes: expected 1 to %d, got %d", maxNodes, c.Nodes))
	}
	errs = append(errs, checkFamilies(c.Families))
	if c.ClusterName == "" {
		errs = append(errs, errors.New("cluster-name is empty"))
	}
	host, _, err := net.SplitHostPort(c.ObserverListen)
	if err != nil {
		errs = append(errs, fmt.Errorf("observer-listen: expected host:port, got %q", c.ObserverListen))
	} else if addr, err := netip.ParseAddr(host); err != nil || !addr.IsLoopback() {
		errs = append(errs, fmt.Errorf("observer-listen: the API is not encrypted, so only a loopback address will do, got %q", host))
	}
	for _, r := range []struct {
		name string
		n    int
	}{{"policies", c.Policies}, {"brokers", c.Brokers}, {"relays", c.Relays}, {"xds", c.XDS}} {
		if r.n < 1 || r.n > maxReplicas {
			errs = append(errs, fmt.Errorf("%s: expected 1 to %d, got %d", r.name, maxReplicas, r.n))
		}
		if r.n > 1 && !c.Separate {
			errs = append(errs, fmt.Errorf("%s: replicas are processes of their own: add --separate", r.name))
		}
	}
	if len(c.RelayArgs)+len(c.ObserverArgs) > 0 && !c.Separate {
		errs = append(errs, errors.New("relay-arg and observer-arg are for processes of their own: add --separate"))
	}
	if c.MTU < 1280 || c.MTU > 65535 {
		errs = append(errs, fmt.Errorf("mtu: expected 1280 (the least that IPv6 allows) to 65535, got %d", c.MTU))
	}
	if c.Self == "" {
		errs = append(errs, errors.New("self is empty"))
	}
	if c.Timeout <= 0 {
		errs = append(errs, errors.New("timeout: expected more than 0"))
	}
	return errors.Join(errs...)
}

func checkFamilies(families []corev1.IPFamily) error {
	for i, family := range families {
		if family != corev1.IPv4Protocol && family != corev1.IPv6Protocol || slices.Contains(families[:i], family) {
			return fmt.Errorf("ip-families: expected IPv4, IPv6 or both, got %v", families)
		}
	}
	if len(families) == 0 {
		return errors.New("ip-families: expected IPv4, IPv6 or both, got nothing")
	}
	return nil
}
