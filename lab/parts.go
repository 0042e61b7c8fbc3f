// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/weirmesh/weir/internal/spiffe"
	"github.com/weirmesh/weir/lab/internal/cluster"
	"github.com/weirmesh/weir/lab/internal/launch"
	"github.com/weirmesh/weir/lab/internal/netns"
	"github.com/weirmesh/weir/lab/internal/part"
)

// trustDomain of a lab's certificates. Each lab has a CA of its own, so no two labs trust each other.
const trustDomain = "weir.lab"

// certificateValidity is longer than anybody leaves a lab up.
const certificateValidity = 90 * 24 * time.Hour

// certificates issues the parts' certificates into files.
type certificates struct {
	ca  *spiffe.CA
	dir string
}

func (l *Lab) makeCertificates() error {
	ca, err := spiffe.NewCA(trustDomain)
	if err != nil {
		return err
	}
	l.certs = &certificates{ca: ca, dir: l.runPath("tls")}
	return os.WriteFile(filepath.Join(l.certs.dir, "ca.crt"), ca.CertPEM(), 0o600)
}

// issue writes a part's certificate and key.
func (c *certificates) issue(service, node string) (spiffe.Files, error) {
	name := service
	if node != "" {
		name += "-" + node
	}
	files := spiffe.Files{
		Cert: filepath.Join(c.dir, name+".crt"), Key: filepath.Join(c.dir, name+".key"), CA: filepath.Join(c.dir, "ca.crt"),
	}
	cert, key, err := c.ca.Issue(spiffe.ID{TrustDomain: trustDomain, Service: service, Node: node}, certificateValidity)
	if err != nil {
		return spiffe.Files{}, err
	}
	return files, errors.Join(os.WriteFile(files.Cert, cert, 0o600), os.WriteFile(files.Key, key, 0o600))
}

func tlsArgs(files spiffe.Files) []string {
	return []string{"--tls-cert", files.Cert, "--tls-key", files.Key, "--tls-ca", files.CA}
}

func replicaName(service string, n int) string {
	if n == 1 {
		return service
	}
	return service + "-" + strconv.Itoa(n)
}

func (c *Config) addresses(n, port int) string {
	var all []string
	for i := range n {
		all = append(all, hostPort(c.central(i+1), port))
	}
	return strings.Join(all, ",")
}

func (c *Config) natsURL() string { return "tls://" + hostPort(c.central(1), natsPort) }

func (c *Config) sourceAddress() string { return hostPort(c.central(1), sourcePort) }

func (l *Lab) agentSocket(node string) string { return l.runPath("nodes/" + node + "/agent.sock") }

// definitions are Weir's processes in the order of their start.
func (l *Lab) definitions() ([]part.Definition, error) {
	central := l.together
	if l.config.Separate {
		central = l.separate
	}
	all, err := central()
	if err != nil {
		return nil, err
	}
	for _, node := range l.nodes {
		agent, err := l.agent(node)
		if err != nil {
			return nil, err
		}
		dns, proxy, err := l.readers(node)
		if err != nil {
			return nil, err
		}
		all = append(all, agent, dns, proxy)
	}
	return all, nil
}

// process is a part in a namespace.
func (l *Lab) process(name, namespace string, args []string, sockets ...string) part.Definition {
	return part.Definition{
		Name: name,
		Launch: launch.Spec{
			Netns: netns.Path(namespace), Cgroup: l.partsCgroup(), Args: args,
			Env: []string{"PATH=" + containerPath(), "HOME=/root", "GOTRACEBACK=single"},
		},
		Log:     l.runPath("logs/" + strings.ReplaceAll(name, "/", "-") + ".log"),
		Sockets: sockets,
	}
}

// separate are the central services as processes of their own.
func (l *Lab) separate() ([]part.Definition, error) {
	var all []part.Definition
	add := func(service, name, program string, args []string, further ...string) error {
		files, err := l.certs.issue(service, "")
		if err != nil {
			return err
		}
		socket := l.runPath(name + ".sock")
		args = append([]string{filepath.Join(l.config.BinDir, program)}, args...)
		args = append(args, tlsArgs(files)...)
		args = append(args, "--socket", socket, "--log-level", l.config.LogLevel, "--cluster-name", l.config.ClusterName)
		// Last, so that they count.
		args = append(args, further...)
		if program == "weir-lab" {
			args[0] = l.config.Self
		}
		all = append(all, l.process(name, l.config.centralNetns(), args, socket))
		return nil
	}
	var errs []error
	errs = append(errs, add("nats", "nats", "weir-lab", []string{
		"nats", "--listen", hostPort(l.config.central(1), natsPort), "--store-dir", filepath.Join(l.stateDir(), "nats"),
	}))
	for n := range l.config.Brokers {
		errs = append(errs, add("identity", replicaName("identity", n+1), "weir-identity", []string{
			"--listen", hostPort(l.config.central(n+1), identityPort), "--nats", l.config.natsURL(),
		}, l.config.IdentityArgs...))
	}
	for n := range l.config.Policies {
		errs = append(errs, add("policy", replicaName("policy", n+1), "weir-policy", []string{
			"--listen", hostPort(l.config.central(n+1), policyPort), "--source", l.config.sourceAddress(), "--identity", l.config.addresses(l.config.Brokers, identityPort),
		}, l.config.PolicyArgs...))
	}
	for n := range l.config.Relays {
		errs = append(errs, add("relay", replicaName("relay", n+1), "weir-relay", []string{
			"--listen", hostPort(l.config.central(n+1), relayPort), "--nats", l.config.natsURL(), "--instance", replicaName("relay", n+1),
		}, l.config.RelayArgs...))
	}
	for n := range l.config.XDS {
		errs = append(errs, add("xds", replicaName("xds", n+1), "weir-xds", []string{
			"--listen", hostPort(l.config.central(n+1), xdsPort), "--policy", l.config.addresses(l.config.Policies, policyPort),
		}, l.config.XDSArgs...))
	}
	errs = append(errs, add("observer", "observer", "weir-observer", []string{
		"--listen-fd", strconv.Itoa(launch.SpecFD + 1), "--nats", l.config.natsURL(), "--instance", "observer",
	}, l.config.ObserverArgs...))
	all[len(all)-1].Files = l.observerListener
	return all, errors.Join(errs...)
}

// observerListener opens the observer's port on the host, in this process's namespace; the observer inherits it. It is opened for each
// start, so that nobody listens while the observer is down.
func (l *Lab) observerListener() ([]*os.File, error) {
	listener, err := net.Listen("tcp", l.config.ObserverListen)
	if err != nil {
		return nil, fmt.Errorf("open the observer's port (another lab may have it: --observer-listen): %w", err)
	}
	defer listener.Close()
	file, err := listener.(*net.TCPListener).File()
	if err != nil {
		return nil, fmt.Errorf("open the observer's port: %w", err)
	}
	return []*os.File{file}, nil
}

// agentPrefix is how names of agents begin.
const agentPrefix = "agent/"

func (l *Lab) agent(node cluster.NodeConfig) (part.Definition, error) {
	files, err := l.certs.issue("agent", node.Name)
	if err != nil {
		return part.Definition{}, err
	}
	socket := l.agentSocket(node.Name)
	args := []string{
		filepath.Join(l.config.BinDir, "weir-agent"), "--node", node.Name,
		"--policy", l.config.addresses(l.config.Policies, policyPort), "--relay", l.config.addresses(l.config.Relays, relayPort),
		"--socket", socket, "--state-dir", filepath.Join(l.stateDir(), "nodes", node.Name),
		"--bpffs", filepath.Join(l.bpfRoot(), node.Name), "--cgroup", filepath.Join(l.cgroupRoot(), node.Name),
		"--uplink", "eth0", "--masquerade", "--log-level", l.config.LogLevel,
		"--cluster-name", l.config.ClusterName,
	}
	args = append(args, tlsArgs(files)...)
	args = append(args, forNode(l.config.AgentArgs, node.Name)...)
	return l.process(agentPrefix+node.Name, l.config.nodeNetns(node.Name), args, socket), nil
}

// forNode are those arguments that are for a node: all, or "node1:--flag" without its prefix.
func forNode(args []string, node string) []string {
	var own []string
	for _, arg := range args {
		if only, rest, ok := strings.Cut(arg, ":--"); ok && !strings.HasPrefix(arg, "-") {
			if only != node {
				continue
			}
			arg = "--" + rest
		}
		own = append(own, arg)
	}
	return own
}

// readers are the processes of a node that read requests: weir-dns, and the proxy.
func (l *Lab) readers(node cluster.NodeConfig) (dns, proxy part.Definition, err error) {
	files, err := l.certs.issue("proxy", node.Name)
	if err != nil {
		return dns, proxy, err
	}
	folder, namespace := l.runPath("nodes/"+node.Name), l.config.nodeNetns(node.Name)
	dnsSocket, proxySocket := filepath.Join(folder, "dns.sock"), filepath.Join(folder, "proxy.sock")
	args := []string{
		filepath.Join(l.config.BinDir, "weir-dns"), "--node", node.Name, "--bpffs", filepath.Join(l.bpfRoot(), node.Name),
		"--agent", l.agentSocket(node.Name), "--state-dir", filepath.Join(l.stateDir(), "nodes", node.Name, "dns"), "--socket", dnsSocket, "--log-level", l.config.LogLevel,
	}
	dns = l.process("dns/"+node.Name, namespace, append(args, forNode(l.config.DNSArgs, node.Name)...), dnsSocket)
	if l.config.ProxyBinary != "" {
		proxy, err = l.envoy(node, files, folder)
		return dns, proxy, err
	}
	args = []string{
		filepath.Join(l.config.BinDir, "weir-proxy"), "--node", node.Name, "--xds", l.config.addresses(l.config.XDS, xdsPort),
		"--socket", proxySocket, "--access-log", filepath.Join(folder, "accesslog.sock"), "--log-level", l.config.LogLevel,
		"--hot-restart-socket", filepath.Join(folder, "proxy-hot.sock"),
	}
	args = append(args, tlsArgs(files)...)
	proxy = l.process("proxy/"+node.Name, namespace, append(args, forNode(l.config.ProxyArgs, node.Name)...), proxySocket)
	return dns, proxy, nil
}

// awaitParts waits until every part says that it is ready.
func (l *Lab) awaitParts(ctx context.Context, definitions []part.Definition) error {
	deadline, cancel := context.WithTimeout(ctx, l.config.Timeout)
	defer cancel()
	for _, definition := range definitions {
		for _, socket := range definition.Sockets {
			begun := time.Now()
			err := part.AwaitReady(deadline, socket, func() error { return l.hopeless(definition.Name) })
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err != nil {
				return fmt.Errorf("%s is not ready after %s: %w; the end of its log:\n%s",
					definition.Name, time.Since(begun).Round(time.Second), err, tail(definition.Log))
			}
		}
	}
	return nil
}

// maxStarts is how often a part may end before it was ready: what fails so often fails for a reason that time does not heal.
const maxStarts = 3

// hopeless reports a part that ends again and again.
func (l *Lab) hopeless(name string) error {
	for _, p := range l.parts.List() {
		if p.Name == name && p.Restarts >= maxStarts {
			return fmt.Errorf("it ended %d times, the last time with %s", p.Restarts, p.LastExit)
		}
	}
	return nil
}

// tail returns the last lines of a file.
func tail(path string) string {
	data, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimRight(string(data), "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-15):], "\n")
}
