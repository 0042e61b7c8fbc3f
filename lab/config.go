// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"regexp"
	"time"
)

// Config says what lab to build.
type Config struct {
	// Name tells labs of one machine apart; default "default". It is part of names of namespaces and folders: lower-case letters and
	// digits, so that no lab's names are the beginning of another's.
	Name string
	// Nodes is how many nodes the lab has, node1 and so on; default 2.
	Nodes int
	// Manifests are files and folders of Kubernetes manifests, which the lab follows; default none.
	Manifests []string
	// ObserverListen is where the observer's API is on the host; default 127.0.0.1:4245.
	ObserverListen string
	// Separate runs each of the central services, and NATS, as a process of its own instead of all in one.
	Separate bool
	// Replicas of services, which need Separate when above 1; default 1 each.
	Policies, Brokers, Relays int
	// BinDir is where Weir's programs are; default: where weir-lab is.
	BinDir string
	// Self is the path of weir-lab; required.
	Self string
	// MTU of the fabric; default 1500.
	MTU int
	// AgentArgs are further arguments of the agents; "node1:--flag" is for one node only.
	AgentArgs []string
	// RelayArgs and ObserverArgs are further arguments of those services; they need Separate.
	RelayArgs, ObserverArgs []string
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
		Name: "default", Nodes: 2, ObserverListen: "127.0.0.1:4245", Policies: 1, Brokers: 1, Relays: 1,
		MTU: 1500, LogLevel: "info", Timeout: time.Minute, Output: io.Discard,
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
	if c.Nodes < 1 || c.Nodes > maxNodes {
		errs = append(errs, fmt.Errorf("nodes: expected 1 to %d, got %d", maxNodes, c.Nodes))
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
	}{{"policies", c.Policies}, {"brokers", c.Brokers}, {"relays", c.Relays}} {
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
