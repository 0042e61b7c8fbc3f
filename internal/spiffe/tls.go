// SPDX-License-Identifier: Apache-2.0

package spiffe

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
)

// ServerTLS returns the server side: TLS 1.3 only, and a client must show a certificate of our CA
// that names a part of our trust domain. Which part may do what is not decided here.
func (s *Source) ServerTLS() *tls.Config {
	config := s.serverConfig()
	config.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		return s.serverConfig(), nil // the trust bundle may have been renewed
	}
	return config
}

func (s *Source) serverConfig() *tls.Config {
	m := s.current()
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{*m.cert},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    m.roots,
		NextProtos:   []string{"h2"},
		// A resumed session would live on after the client's certificate or the CA was replaced.
		SessionTicketsDisabled: true,
		VerifyConnection: func(state tls.ConnectionState) error {
			if len(state.PeerCertificates) == 0 {
				return errors.New("client has no certificate")
			}
			_, err := s.check(state.PeerCertificates[0])
			return err
		},
	}
}

// ClientTLS returns the client side: it accepts only a server whose certificate, of our CA, names
// the given service, on any node, in our trust domain. Host names and addresses are not looked at,
// since Weir's parts are found by configured addresses and known by their names.
func (s *Source) ClientTLS(service string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: []string{"h2"},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return s.current().cert, nil
		},
		// The standard verification wants a host name; VerifyConnection below does the rest of it.
		InsecureSkipVerify: true,
		VerifyConnection: func(state tls.ConnectionState) error {
			return s.verifyServer(state, service)
		},
	}
}

func (s *Source) verifyServer(state tls.ConnectionState, service string) error {
	if len(state.PeerCertificates) == 0 {
		return errors.New("server has no certificate")
	}
	leaf := state.PeerCertificates[0]
	intermediates := x509.NewCertPool()
	for _, cert := range state.PeerCertificates[1:] {
		intermediates.AddCert(cert)
	}
	if _, err := leaf.Verify(x509.VerifyOptions{
		Roots:         s.current().roots,
		Intermediates: intermediates,
		CurrentTime:   s.now(),
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}); err != nil {
		return fmt.Errorf("verify server: %w", err)
	}
	id, err := s.check(leaf)
	if err != nil {
		return fmt.Errorf("verify server: %w", err)
	}
	if id.Service != service {
		return fmt.Errorf("verify server: it is %s, not %s", id.Service, service)
	}
	return nil
}

// check reads the name of a verified certificate and requires our trust domain.
func (s *Source) check(cert *x509.Certificate) (ID, error) {
	id, err := certificateID(cert)
	if err != nil {
		return ID{}, err
	}
	if id.TrustDomain != s.id.TrustDomain {
		return ID{}, fmt.Errorf("trust domain of %s is not %s", id, s.id.TrustDomain)
	}
	return id, nil
}

// ServerCredentials is ServerTLS for gRPC.
func (s *Source) ServerCredentials() credentials.TransportCredentials {
	return credentials.NewTLS(s.ServerTLS())
}

// ClientCredentials is ClientTLS for gRPC.
func (s *Source) ClientCredentials(service string) credentials.TransportCredentials {
	return credentials.NewTLS(s.ClientTLS(service))
}

// LocalInfo is the gRPC authentication of a unix-socket peer whose user the kernel vouched for.
// Only package server makes it.
type LocalInfo struct {
	credentials.CommonAuthInfo
	UID uint32
	PID int32
}

// AuthType implements credentials.AuthInfo.
func (LocalInfo) AuthType() string { return "unix" }

// PeerID returns who is at the other end of a gRPC call served here. It is false for a peer that
// proved nothing. A checked unix-socket peer is ID{Service: Local}.
func PeerID(ctx context.Context) (ID, bool) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return ID{}, false
	}
	switch info := p.AuthInfo.(type) {
	case credentials.TLSInfo:
		// Only a chain that the handshake verified counts.
		if len(info.State.VerifiedChains) == 0 || len(info.State.PeerCertificates) == 0 {
			return ID{}, false
		}
		id, err := certificateID(info.State.PeerCertificates[0])
		return id, err == nil
	case LocalInfo:
		return ID{Service: Local}, true
	}
	return ID{}, false
}
