// SPDX-License-Identifier: Apache-2.0

// Package tlsconf compiles TLS contexts. Keys and certificates are inline: what names a file, a variable of the environment or a secret service is refused.
package tlsconf

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/weirmesh/weir/services/proxy/internal/fields"
	"github.com/weirmesh/weir/services/proxy/internal/match"
	"github.com/weirmesh/weir/services/proxy/internal/resource"
)

// Names of transport sockets.
const (
	nameTLS = "envoy.transport_sockets.tls"
	nameRaw = "envoy.transport_sockets.raw_buffer"
)

// Server compiles a filter chain's transport socket; nil = plain TCP.
func Server(path string, socket *corev3.TransportSocket, matchers *match.Compiler) (*tls.Config, error) {
	config, err := typed(path, socket)
	if config == nil || err != nil {
		return nil, err
	}
	var in tlsv3.DownstreamTlsContext
	if err := resource.Unpack(path, config, &in); err != nil {
		return nil, err
	}
	if err := fields.Only(&in, path, "common_tls_context", "require_client_certificate", "require_sni", "disable_stateful_session_resumption",
		"session_timeout", "prefer_client_ciphers", "disable_stateless_session_resumption"); err != nil {
		return nil, err
	}
	out, validation, err := common(path+".common_tls_context", in.GetCommonTlsContext())
	if err != nil {
		return nil, err
	}
	if len(out.Certificates) == 0 {
		return nil, fmt.Errorf("%s: no certificate", path)
	}
	out.SessionTicketsDisabled = in.GetDisableStatelessSessionResumption()
	verify, err := newVerifier(path, validation, matchers)
	if err != nil {
		return nil, err
	}
	switch {
	case in.GetRequireClientCertificate().GetValue():
		if verify.roots == nil {
			return nil, fmt.Errorf("%s: a client's certificate is required, but there is no trusted_ca to check it by", path)
		}
		out.ClientAuth, out.ClientCAs = tls.RequireAndVerifyClientCert, verify.roots
	case verify.roots != nil:
		out.ClientAuth, out.ClientCAs = tls.VerifyClientCertIfGiven, verify.roots
	}
	requireSNI := in.GetRequireSni().GetValue()
	out.VerifyConnection = func(state tls.ConnectionState) error {
		if requireSNI && state.ServerName == "" {
			return errors.New("the client names no server")
		}
		if len(state.PeerCertificates) == 0 {
			return nil
		}
		return verify.names(state.PeerCertificates[0])
	}
	return out, nil
}

// Client wraps connections to a server in TLS.
type Client struct{ config *tls.Config }

// NewClient compiles a cluster's transport socket; nil = plain TCP. alpn are the protocols to offer if the context names none.
func NewClient(path string, socket *corev3.TransportSocket, alpn []string, matchers *match.Compiler) (*Client, error) {
	config, err := typed(path, socket)
	if config == nil || err != nil {
		return nil, err
	}
	var in tlsv3.UpstreamTlsContext
	if err := resource.Unpack(path, config, &in); err != nil {
		return nil, err
	}
	if err := fields.Only(&in, path, "common_tls_context", "sni", "max_session_keys", "enforce_rsa_key_usage"); err != nil {
		return nil, err
	}
	out, validation, err := common(path+".common_tls_context", in.GetCommonTlsContext())
	if err != nil {
		return nil, err
	}
	verify, err := newVerifier(path, validation, matchers)
	if err != nil {
		return nil, err
	}
	if len(out.NextProtos) == 0 {
		out.NextProtos = alpn
	}
	out.ServerName = in.GetSni()
	// As in Envoy: without a trusted CA the server is not verified, and its name is what the context says, not what was dialled.
	out.InsecureSkipVerify = true
	out.VerifyConnection = verify.server
	return &Client{config: out}, nil
}

// Handshake makes a TLS connection of conn, which it closes if that fails.
func (c *Client) Handshake(ctx context.Context, conn net.Conn) (net.Conn, error) {
	secured := tls.Client(conn, c.config)
	if err := secured.HandshakeContext(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("tls: %w", err), conn.Close())
	}
	return secured, nil
}

// typed returns the TLS context of a transport socket; nil = plain.
func typed(path string, socket *corev3.TransportSocket) (*anypb.Any, error) {
	if socket == nil || socket.GetName() == nameRaw {
		return nil, nil //nolint:nilnil // plain TCP is no error
	}
	if socket.GetTypedConfig().GetTypeUrl() == "type.googleapis.com/envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer" {
		return nil, nil //nolint:nilnil // plain TCP under a name of its own
	}
	if socket.GetTypedConfig() == nil {
		return nil, fmt.Errorf("%s: transport socket %q is not supported", path, socket.GetName())
	}
	return socket.GetTypedConfig(), nil
}

func common(path string, in *tlsv3.CommonTlsContext) (*tls.Config, *tlsv3.CertificateValidationContext, error) {
	out := &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: slices.Clone(in.GetAlpnProtocols())}
	if in == nil {
		return out, nil, nil
	}
	if err := fields.Only(in, path, "tls_params", "tls_certificates", "alpn_protocols", "validation_context"); err != nil {
		return nil, nil, err
	}
	if err := parameters(path+".tls_params", in.GetTlsParams(), out); err != nil {
		return nil, nil, err
	}
	for i, c := range in.GetTlsCertificates() {
		at := fmt.Sprintf("%s.tls_certificates[%d]", path, i)
		if err := fields.Only(c, at, "certificate_chain", "private_key"); err != nil {
			return nil, nil, err
		}
		chain, err := inline(at+".certificate_chain", c.GetCertificateChain())
		if err != nil {
			return nil, nil, err
		}
		key, err := inline(at+".private_key", c.GetPrivateKey())
		if err != nil {
			return nil, nil, err
		}
		cert, err := tls.X509KeyPair(chain, key)
		if err != nil {
			return nil, nil, fmt.Errorf("%s: %w", at, err)
		}
		out.Certificates = append(out.Certificates, cert)
	}
	return out, in.GetValidationContext(), nil
}

func parameters(path string, in *tlsv3.TlsParameters, out *tls.Config) error {
	if in == nil {
		return nil
	}
	// Suites and curves are left to crypto/tls, which has no bad ones; naming them only ever narrows.
	if err := fields.Only(in, path, "tls_minimum_protocol_version", "tls_maximum_protocol_version", "cipher_suites", "ecdh_curves"); err != nil {
		return err
	}
	version := func(v tlsv3.TlsParameters_TlsProtocol, auto uint16) (uint16, error) {
		switch v {
		case tlsv3.TlsParameters_TLS_AUTO:
			return auto, nil
		case tlsv3.TlsParameters_TLSv1_2:
			return tls.VersionTLS12, nil
		case tlsv3.TlsParameters_TLSv1_3:
			return tls.VersionTLS13, nil
		case tlsv3.TlsParameters_TLSv1_0, tlsv3.TlsParameters_TLSv1_1:
		}
		return 0, fmt.Errorf("%s: %s is not supported", path, v)
	}
	var err error
	if out.MinVersion, err = version(in.GetTlsMinimumProtocolVersion(), tls.VersionTLS12); err != nil {
		return err
	}
	out.MaxVersion, err = version(in.GetTlsMaximumProtocolVersion(), 0)
	return err
}

func inline(path string, in *corev3.DataSource) ([]byte, error) {
	switch s := in.GetSpecifier().(type) {
	case *corev3.DataSource_InlineBytes:
		return s.InlineBytes, nil
	case *corev3.DataSource_InlineString:
		return []byte(s.InlineString), nil
	case *corev3.DataSource_Filename:
		return nil, fmt.Errorf("%s: filename is not supported, only inline data", path)
	case *corev3.DataSource_EnvironmentVariable:
		return nil, fmt.Errorf("%s: environment_variable is not supported, only inline data", path)
	}
	return nil, fmt.Errorf("%s is empty", path)
}

// verifier checks the other side's certificate.
type verifier struct {
	roots   *x509.CertPool
	matches []func(*x509.Certificate) bool
	expired bool // also expired certificates are taken
}

func newVerifier(path string, in *tlsv3.CertificateValidationContext, matchers *match.Compiler) (*verifier, error) {
	v := &verifier{}
	if in == nil {
		return v, nil
	}
	path += ".validation_context"
	if err := fields.Only(in, path, "trusted_ca", "match_typed_subject_alt_names", "allow_expired_certificate"); err != nil {
		return nil, err
	}
	v.expired = in.GetAllowExpiredCertificate()
	if in.GetTrustedCa() != nil {
		pem, err := inline(path+".trusted_ca", in.GetTrustedCa())
		if err != nil {
			return nil, err
		}
		v.roots = x509.NewCertPool()
		if !v.roots.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s.trusted_ca: no certificate in it", path)
		}
	}
	for i, m := range in.GetMatchTypedSubjectAltNames() {
		matches, err := nameMatch(fmt.Sprintf("%s.match_typed_subject_alt_names[%d]", path, i), m, matchers)
		if err != nil {
			return nil, err
		}
		v.matches = append(v.matches, matches)
	}
	if len(v.matches) > 0 && v.roots == nil {
		return nil, fmt.Errorf("%s: names are matched, but there is no trusted_ca", path)
	}
	return v, nil
}

func nameMatch(path string, in *tlsv3.SubjectAltNameMatcher, matchers *match.Compiler) (func(*x509.Certificate) bool, error) {
	matches, err := matchers.String(in.GetMatcher(), path+".matcher")
	if err != nil {
		return nil, err
	}
	switch in.GetSanType() {
	case tlsv3.SubjectAltNameMatcher_DNS:
		return func(c *x509.Certificate) bool { return slices.ContainsFunc(c.DNSNames, matches) }, nil
	case tlsv3.SubjectAltNameMatcher_URI:
		return func(c *x509.Certificate) bool {
			for _, u := range c.URIs {
				if matches(u.String()) {
					return true
				}
			}
			return false
		}, nil
	case tlsv3.SubjectAltNameMatcher_IP_ADDRESS:
		return func(c *x509.Certificate) bool {
			for _, ip := range c.IPAddresses {
				if matches(ip.String()) {
					return true
				}
			}
			return false
		}, nil
	case tlsv3.SubjectAltNameMatcher_EMAIL:
		return func(c *x509.Certificate) bool { return slices.ContainsFunc(c.EmailAddresses, matches) }, nil
	case tlsv3.SubjectAltNameMatcher_SAN_TYPE_UNSPECIFIED, tlsv3.SubjectAltNameMatcher_OTHER_NAME:
	}
	return nil, fmt.Errorf("%s: san_type %s is not supported", path, in.GetSanType())
}

func (v *verifier) names(leaf *x509.Certificate) error {
	if len(v.matches) == 0 {
		return nil
	}
	for _, matches := range v.matches {
		if matches(leaf) {
			return nil
		}
	}
	return fmt.Errorf("the certificate of %q has none of the names asked for", strings.Join(leaf.DNSNames, ","))
}

// server verifies a server's certificate as far as there is something to verify it by.
func (v *verifier) server(state tls.ConnectionState) error {
	if v.roots == nil {
		return nil
	}
	if len(state.PeerCertificates) == 0 {
		return errors.New("the server has no certificate")
	}
	leaf := state.PeerCertificates[0]
	intermediates := x509.NewCertPool()
	for _, c := range state.PeerCertificates[1:] {
		intermediates.AddCert(c)
	}
	now := time.Now()
	if v.expired && now.After(leaf.NotAfter) {
		now = leaf.NotAfter
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: v.roots, Intermediates: intermediates, CurrentTime: now}); err != nil {
		return fmt.Errorf("verify server: %w", err)
	}
	return v.names(leaf)
}
