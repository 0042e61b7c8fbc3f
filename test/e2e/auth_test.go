// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	flowv1 "github.com/weirmesh/weir/gen/weir/flow/v1"
	identityv1 "github.com/weirmesh/weir/gen/weir/identity/v1"
	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	relayv1 "github.com/weirmesh/weir/gen/weir/relay/v1"
	sourcev1 "github.com/weirmesh/weir/gen/weir/source/v1"
	statusv1 "github.com/weirmesh/weir/gen/weir/status/v1"
	"github.com/weirmesh/weir/test/e2e/cluster"
	"github.com/weirmesh/weir/test/e2e/traffic"
)

// fabricPorts are all that Weir's parts open for each other.
var fabricPorts = map[string]string{
	"nats": "172.30.0.2:4222", "policy": "172.30.0.2:18001", "identity": "172.30.0.2:18002", "source": "172.30.0.2:18003", "relay": "172.30.0.2:4244",
	"xds": "172.30.0.2:18000",
}

// TestAuthentication: every port inside the fabric refuses who cannot show a certificate of the lab, and every RPC who shows the wrong one.
func TestAuthentication(t *testing.T) {
	lab := cluster.Up(t, truthPods, "--separate")
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	a := &attacker{lab: lab, netns: lab.NodeNetns(ctx, "node1"), tls: filepath.Join("/run/weir", lab.Name, "tls")}
	t.Run("ports", func(t *testing.T) { a.ports(ctx, t) })
	t.Run("handshake", func(t *testing.T) { a.handshakes(ctx, t) })
	t.Run("calls", func(t *testing.T) { a.calls(ctx, t) })
	t.Run("another-node", func(t *testing.T) { a.anotherNode(ctx, t) })
	// After all of this the agents still do their work.
	if saw := ask(ctx, t, lab, "default/a", "tcp", netip.AddrPortFrom(pathAddresses["c"][0], traffic.WhoPort)); saw.Server != "c" {
		t.Errorf("a to c: %+v", saw)
	}
}

// attacker stands on a node.
type attacker struct {
	lab        *cluster.Lab
	netns, tls string
}

// ports compares what listens in the central namespace with the table above: a new port must be tested too.
func (a *attacker) ports(ctx context.Context, t *testing.T) {
	known := map[string]bool{}
	for _, addr := range fabricPorts {
		known[addr] = true
	}
	var open int
	for _, addr := range a.lab.Listeners(ctx, a.lab.Part(ctx, "policy").Netns) {
		open++
		if !known[addr] {
			t.Errorf("something listens on %s of the central services: this test does not know it", addr)
		}
	}
	if open != len(known) {
		t.Errorf("%d ports are open, want %d", open, len(known))
	}
	for _, node := range []string{"node1", "node2"} {
		if open := a.lab.Listeners(ctx, a.lab.NodeNetns(ctx, node)); len(open) > 0 {
			t.Errorf("%s listens on %v, want nothing: the agent has a unix socket alone", node, open)
		}
	}
}

// certificate reads one of the lab's.
func (a *attacker) certificate(t *testing.T, name string) *tls.Certificate {
	t.Helper()
	c, err := tls.LoadX509KeyPair(filepath.Join(a.tls, name+".crt"), filepath.Join(a.tls, name+".key"))
	if err != nil {
		t.Fatal(err)
	}
	return &c
}

// foreign makes a certificate with a part's name, signed by a CA that nobody here knows.
func foreign(t *testing.T, uri string) *tls.Certificate {
	t.Helper()
	sign := func(template, parent *x509.Certificate, key, parentKey *ecdsa.PrivateKey) []byte {
		der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), parentKey)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	newKey := func() *ecdsa.PrivateKey {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	name, err := url.Parse(uri)
	if err != nil {
		t.Fatal(err)
	}
	validity := x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	ca, leaf := validity, validity
	ca.IsCA, ca.BasicConstraintsValid, ca.KeyUsage = true, true, x509.KeyUsageCertSign
	leaf.URIs, leaf.KeyUsage = []*url.URL{name}, x509.KeyUsageDigitalSignature
	leaf.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}
	caKey, leafKey := newKey(), newKey()
	caDER := sign(&ca, &ca, caKey, caKey)
	parsed, err := x509.ParseCertificate(caDER)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{sign(&leaf, parsed, leafKey, caKey), caDER}, PrivateKey: leafKey}
}

// clientTLS is a client that takes any server, and shows its certificate whatever CAs the server asks for.
func clientTLS(c *tls.Certificate) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12, InsecureSkipVerify: true, NextProtos: []string{"h2"}, //nolint:gosec // the attacker does not care
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			if c == nil {
				return new(tls.Certificate), nil
			}
			return c, nil
		},
	}
}

// handshakes tries every port with every kind of wrong certificate, and with a right one.
func (a *attacker) handshakes(ctx context.Context, t *testing.T) {
	for part, addr := range fabricPorts {
		for _, c := range []struct {
			name string
			cert *tls.Certificate
			// What the server says; empty = it lets the client in.
			refused string
		}{
			{"no certificate", nil, "certificate required"},
			{"a foreign CA", foreign(t, "spiffe://weir.lab/weir/policy"), "unknown certificate authority|bad certificate"},
			{"a foreign CA, of a node", foreign(t, "spiffe://weir.lab/weir/agent/node1"), "unknown certificate authority|bad certificate"},
			{"the lab's certificate", a.certificate(t, "identity"), ""},
		} {
			first, err := a.firstBytes(ctx, addr, clientTLS(c.cert))
			switch {
			case c.refused == "" && err != nil:
				t.Errorf("%s with %s: %v, want to be let in", part, c.name, err)
			case c.refused != "" && err == nil:
				t.Errorf("%s with %s: the server speaks: %q", part, c.name, first)
			case c.refused != "" && !alert(err, c.refused):
				t.Errorf("%s with %s: %v, want the alert %q", part, c.name, err, c.refused)
			}
		}
		// Without TLS nobody gets a word of the protocol behind.
		if first, err := a.firstBytes(ctx, addr, nil); err == nil && (strings.HasPrefix(first, "INFO") || len(first) > 3 && first[3] == 4 && first[0] == 0) {
			t.Errorf("%s without TLS: the server speaks: %q", part, first)
		}
		// Nor with a TLS that is out of date.
		old := clientTLS(a.certificate(t, "identity"))
		old.MaxVersion = tls.VersionTLS12
		if first, err := a.firstBytes(ctx, addr, old); err == nil || !alert(err, "protocol version not supported") {
			t.Errorf("%s with TLS 1.2: %q, %v, want it refused", part, first, err)
		}
	}
}

func alert(err error, texts string) bool {
	for text := range strings.SplitSeq(texts, "|") {
		if strings.Contains(err.Error(), "remote error: tls: "+text) {
			return true
		}
	}
	return false
}

// firstBytes says what a port says first: HTTP/2 settings, or INFO of NATS. With TLS 1.3 a client learns only then that it is refused.
func (a *attacker) firstBytes(ctx context.Context, addr string, config *tls.Config) (string, error) {
	raw, err := a.lab.Dial(ctx, a.netns, "tcp", addr)
	if err != nil {
		return "", err
	}
	defer raw.Close()
	if err := raw.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return "", err
	}
	conn := raw
	if config != nil {
		if strings.HasSuffix(addr, ":4222") {
			config = config.Clone()
			config.NextProtos = nil
		}
		conn = tls.Client(raw, config)
	}
	if !strings.HasSuffix(addr, ":4222") {
		if _, err := io.WriteString(conn, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"); err != nil {
			return "", err
		}
	} else if config == nil {
		if _, err := io.WriteString(conn, "PING\r\n"); err != nil {
			return "", err
		}
	}
	b := make([]byte, 9)
	n, err := io.ReadAtLeast(conn, b, 4)
	return string(b[:n]), err
}

// grpc calls a part with a certificate.
func (a *attacker) grpc(t *testing.T, part, certificate string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+fabricPorts[part],
		grpc.WithTransportCredentials(credentials.NewTLS(clientTLS(a.certificate(t, certificate)))),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) { return a.lab.Dial(ctx, a.netns, "tcp", addr) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// calls: who may connect may still not call everything.
func (a *attacker) calls(ctx context.Context, t *testing.T) {
	identity := func(cert string) identityv1.IdentityServiceClient {
		return identityv1.NewIdentityServiceClient(a.grpc(t, "identity", cert))
	}
	labels := []string{"k8s:app=attacker"}
	for _, c := range []struct {
		name string
		want codes.Code
		call func() error
	}{
		{"agent allocates an identity", codes.PermissionDenied, func() error {
			_, err := identity("agent-node1").Allocate(ctx, &identityv1.AllocateRequest{Labels: labels})
			return err
		}},
		{"agent releases an identity", codes.PermissionDenied, func() error {
			_, err := identity("agent-node1").Release(ctx, &identityv1.ReleaseRequest{Labels: labels})
			return err
		}},
		{"relay lists identities", codes.PermissionDenied, func() error { return listIdentities(ctx, identity("relay")) }},
		{"policy lists identities", codes.OK, func() error { return listIdentities(ctx, identity("policy")) }},
		{"agent watches the objects", codes.PermissionDenied, func() error { return a.watch(ctx, t, "agent-node1") }},
		{"policy watches the objects", codes.OK, func() error { return a.watch(ctx, t, "policy") }},
		{"relay syncs as a node", codes.PermissionDenied, func() error { return a.sync(ctx, t, "relay", hello("node1")) }},
		{"proxy watches what is rendered", codes.PermissionDenied, func() error { return a.render(ctx, t, "proxy-node1") }},
		{"agent asks for a proxy's configuration", codes.PermissionDenied, func() error { return a.discover(ctx, t, "agent-node1", "node1") }},
		{"proxy asks for another node's configuration", codes.PermissionDenied, func() error { return a.discover(ctx, t, "proxy-node1", "node2") }},
		{"proxy asks for its configuration", codes.OK, func() error { return a.discover(ctx, t, "proxy-node1", "node1") }},
		{"policy publishes flows", codes.PermissionDenied, func() error { return a.publish(ctx, t, "policy", "node1") }},
		{"agent asks the policy service's status over TCP", codes.PermissionDenied, func() error {
			_, err := statusv1.NewStatusServiceClient(a.grpc(t, "policy", "agent-node1")).GetStatus(ctx, &statusv1.GetStatusRequest{})
			return err
		}},
		{"agent calls what nobody serves", codes.Unimplemented, func() error {
			return a.grpc(t, "policy", "agent-node1").Invoke(ctx, "/weir.policy.v1.PolicyService/Nothing", &statusv1.GetStatusRequest{}, &statusv1.GetStatusResponse{})
		}},
	} {
		if err := c.call(); status.Code(err) != c.want {
			t.Errorf("%s: %v, want %s", c.name, err, c.want)
		}
	}
	// NATS is for those who need it; an agent is not among them.
	if answer, err := a.natsConnect(ctx, a.certificate(t, "agent-node1")); err == nil && !strings.Contains(answer, "Authorization Violation") {
		t.Errorf("NATS to an agent: %q, want a refusal", answer)
	}
	if answer, err := a.natsConnect(ctx, a.certificate(t, "relay")); err != nil || answer != "PONG" {
		t.Errorf("NATS to a relay: %q, %v, want PONG", answer, err)
	}
}

// render asks the policy service for what xDS servers render.
func (a *attacker) render(ctx context.Context, t *testing.T, cert string) error {
	stream, err := policyv1.NewRenderServiceClient(a.grpc(t, "policy", cert)).Watch(ctx)
	if err != nil {
		return err
	}
	_, err = stream.Recv()
	return err
}

// discover asks an xDS server for a node's clusters.
func (a *attacker) discover(ctx context.Context, t *testing.T, cert, node string) error {
	stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(a.grpc(t, "xds", cert)).StreamAggregatedResources(ctx)
	if err != nil {
		return err
	}
	err = stream.Send(&discoveryv3.DiscoveryRequest{Node: &corev3.Node{Id: node}, TypeUrl: "type.googleapis.com/envoy.config.cluster.v3.Cluster"})
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	_, err = stream.Recv()
	return err
}

// natsConnect logs in and returns the first word of the server about it.
func (a *attacker) natsConnect(ctx context.Context, cert *tls.Certificate) (string, error) {
	raw, err := a.lab.Dial(ctx, a.netns, "tcp", fabricPorts["nats"])
	if err != nil {
		return "", err
	}
	config := clientTLS(cert)
	config.NextProtos = nil
	conn := tls.Client(raw, config)
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return "", err
	}
	if _, err := io.WriteString(conn, "CONNECT {\"verbose\":false,\"protocol\":1}\r\nPING\r\n"); err != nil {
		return "", err
	}
	for lines := bufio.NewReader(conn); ; {
		line, err := lines.ReadString('\n')
		if err != nil || !strings.HasPrefix(line, "INFO") {
			return strings.TrimSpace(line), err
		}
	}
}

// anotherNode: an agent speaks for its own node only.
func (a *attacker) anotherNode(ctx context.Context, t *testing.T) {
	if err := a.sync(ctx, t, "agent-node1", hello("node2")); status.Code(err) != codes.PermissionDenied {
		t.Errorf("node1's agent syncs as node2: %v, want PermissionDenied", err)
	}
	if err := a.publish(ctx, t, "agent-node1", "node2"); status.Code(err) != codes.PermissionDenied {
		t.Errorf("node1's agent publishes flows of node2: %v, want PermissionDenied", err)
	}
	// It registers endpoints of its own node only, too: neither one that it says is the other's, nor one that the other has.
	uid := map[string]string{}
	for _, p := range a.lab.State(ctx).Pods {
		uid[p.Name] = p.Uid
	}
	for what, e := range map[string]*policyv1.Endpoint{
		"names node2":      {Uid: uid["c"], Node: "node2", Addresses: []string{"10.244.2.103"}},
		"is node2's":       {Uid: uid["c"], Node: "node1", Addresses: []string{"10.244.1.250"}},
		"has node2's CIDR": {Uid: uid["a"], Node: "node1", Addresses: []string{"10.244.2.103"}},
	} {
		cluster.Eventually(t, func() error {
			// The real agent's stream gives way to this one, and comes back when it ends or even before: then another try is needed.
			err := a.sync(ctx, t, "agent-node1", hello("node1"), &policyv1.SyncRequest{Message: &policyv1.SyncRequest_Register{Register: e}})
			if code := status.Code(err); code == codes.Aborted || code == codes.Unavailable {
				return err
			}
			if err == nil || !errors.Is(err, errRefused) && status.Code(err) != codes.PermissionDenied {
				t.Errorf("node1's agent registers an endpoint that %s: %v, want it refused", what, err)
			}
			return nil
		})
	}
	for _, e := range endpointList(t, a.lab) {
		if e.Pod == "c" && (e.Node != "node2" || e.State != "ready") {
			t.Errorf("endpoint of c: %+v", e)
		}
	}
}

// errRefused is the policy service's no to a registration.
var errRefused = errors.New("registration refused")

func hello(node string) *policyv1.SyncRequest {
	return &policyv1.SyncRequest{Message: &policyv1.SyncRequest_Hello{Hello: &policyv1.Hello{Node: node, Version: "test", Instance: "test"}}}
}

// sync opens an agent's stream, sends the messages, and returns why it ended or what the server refused; nil = it goes on, after the last message was answered.
func (a *attacker) sync(ctx context.Context, t *testing.T, cert string, messages ...*policyv1.SyncRequest) error {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	stream, err := policyv1.NewPolicyServiceClient(a.grpc(t, "policy", cert)).Sync(ctx)
	if err != nil {
		return err
	}
	for _, m := range messages {
		if err := stream.Send(m); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
	}
	for {
		resp, err := stream.Recv()
		if err != nil {
			return err
		}
		if s := resp.GetSpread(); s != nil {
			if s.Error != "" {
				return fmt.Errorf("%w: %s", errRefused, s.Error)
			}
			return nil
		}
		if resp.GetSynced() != nil && len(messages) == 1 {
			return nil
		}
	}
}

func (a *attacker) publish(ctx context.Context, t *testing.T, cert, node string) error {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	stream, err := relayv1.NewRelayServiceClient(a.grpc(t, "relay", cert)).Publish(ctx)
	if err != nil {
		return err
	}
	now := time.Now().UnixNano()
	b, err := proto.Marshal(&flowv1.Batch{
		Header:  &flowv1.BatchHeader{Node: node, Epoch: 1, First: 1, Count: 1, MinTime: now, MaxTime: now, Namespaces: []string{""}},
		Records: []*flowv1.Record{{Time: now, Item: &flowv1.Record_Loss{Loss: &flowv1.Loss{Place: flowv1.Place_PLACE_AGENT, Cause: flowv1.Cause_CAUSE_FULL, Count: 1}}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&relayv1.PublishRequest{Batch: b}); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	resp, err := stream.Recv()
	if err == nil && resp.Error != "" {
		return fmt.Errorf("the relay refuses: %s", resp.Error)
	}
	return err
}

func (a *attacker) watch(ctx context.Context, t *testing.T, cert string) error {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	stream, err := sourcev1.NewSourceServiceClient(a.grpc(t, "source", cert)).Watch(ctx, &sourcev1.WatchRequest{})
	if err != nil {
		return err
	}
	_, err = stream.Recv()
	return err
}

func listIdentities(ctx context.Context, c identityv1.IdentityServiceClient) error {
	_, err := c.List(ctx, &identityv1.ListRequest{})
	return err
}
