// SPDX-License-Identifier: Apache-2.0

// Package spiffe authenticates Weir's parts to each other: it names them (ID), issues their
// certificates (CA), loads and reloads those from files (Source) and makes the mutual TLS
// configurations of both ends.
//
// A part is spiffe://<trust domain>/weir/<service>[/<node>]. What a part may do is decided by its
// service and node alone, so nothing else in a certificate is ever read.
package spiffe

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"strings"
)

// Local is the service of a peer on a unix socket whose user the kernel vouched for.
const Local = "local"

// ID names a part of Weir. Node is empty for parts that do not belong to one node.
type ID struct {
	TrustDomain string
	Service     string
	Node        string
}

// String returns the SPIFFE URI. It is the inverse of ParseID for every valid ID.
func (id ID) String() string {
	s := "spiffe://" + id.TrustDomain + "/weir/" + id.Service
	if id.Node != "" {
		s += "/" + id.Node
	}
	return s
}

// ParseID reads a SPIFFE URI that names a part of Weir. It accepts exactly what String writes: no
// upper case scheme or trust domain, no port, user, query, fragment or percent encoding, so that
// two texts never name one part.
func ParseID(uri string) (ID, error) {
	rest, ok := strings.CutPrefix(uri, "spiffe://")
	if !ok {
		return ID{}, fmt.Errorf("spiffe id %q: scheme is not spiffe", uri)
	}
	parts := strings.Split(rest, "/")
	if len(parts) < 3 || len(parts) > 4 || parts[1] != "weir" {
		return ID{}, fmt.Errorf("spiffe id %q: path is not /weir/<service>[/<node>]", uri)
	}
	id := ID{TrustDomain: parts[0], Service: parts[2]}
	if len(parts) == 4 {
		id.Node = parts[3]
		if id.Node == "" {
			return ID{}, fmt.Errorf("spiffe id %q: node is empty", uri)
		}
	}
	if err := id.validate(); err != nil {
		return ID{}, fmt.Errorf("spiffe id %q: %w", uri, err)
	}
	return id, nil
}

// validate checks the characters and lengths of each part of the name. "local" is refused as a
// service because PeerID gives it to unix-socket peers: no certificate may claim it.
func (id ID) validate() error {
	return errors.Join(
		checkName("trust domain", id.TrustDomain, 255, false),
		checkName("service", id.Service, 63, false),
		checkNode(id.Node),
		checkReserved(id.Service),
	)
}

func checkReserved(service string) error {
	if service == Local {
		return errors.New(`service "local" is reserved for unix sockets`)
	}
	return nil
}

func checkNode(node string) error {
	if node == "" {
		return nil
	}
	return checkName("node", node, 253, true)
}

func checkName(what, s string, maxLen int, upper bool) error {
	if s == "" || len(s) > maxLen {
		return fmt.Errorf("%s has %d characters, not 1 to %d", what, len(s), maxLen)
	}
	if s == "." || s == ".." {
		return fmt.Errorf("%s is %q", what, s)
	}
	for _, c := range []byte(s) {
		switch {
		case 'a' <= c && c <= 'z', '0' <= c && c <= '9', c == '-', c == '.', c == '_':
		case upper && 'A' <= c && c <= 'Z':
		default:
			return fmt.Errorf("%s has the character %q", what, c)
		}
	}
	return nil
}

func (id ID) url() *url.URL {
	path := "/weir/" + id.Service
	if id.Node != "" {
		path += "/" + id.Node
	}
	return &url.URL{Scheme: "spiffe", Host: id.TrustDomain, Path: path}
}

// certificateID returns the ID a certificate carries: its only URI name.
func certificateID(cert *x509.Certificate) (ID, error) {
	if len(cert.URIs) != 1 {
		return ID{}, fmt.Errorf("certificate has %d uri names, not 1", len(cert.URIs))
	}
	return ParseID(cert.URIs[0].String())
}
