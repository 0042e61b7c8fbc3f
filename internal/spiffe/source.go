// SPDX-License-Identifier: Apache-2.0

package spiffe

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"
)

// recheck is how often, at most, the files are looked at.
const recheck = time.Minute

// Files are the PEM files of a part: its certificate (leaf first), its key and the certificates of
// the CAs it trusts.
type Files struct {
	Cert string
	Key  string
	CA   string
}

// Validate reports every path that is missing.
func (f Files) Validate() error {
	var errs []error
	for _, p := range []struct{ name, value string }{{"tls-cert", f.Cert}, {"tls-key", f.Key}, {"tls-ca", f.CA}} {
		if p.value == "" {
			errs = append(errs, fmt.Errorf("%s is empty", p.name))
		}
	}
	return errors.Join(errs...)
}

// Source is a part's certificate and trust bundle. The files are read again when a handshake finds
// them changed; while they cannot be used (half-written, another identity) the last good ones stay
// and ReloadError says why. Safe for concurrent use.
type Source struct {
	files Files
	id    ID
	now   func() time.Time

	mu        sync.Mutex
	material  material
	checked   time.Time
	reloadErr error
}

// material is what one reading of the files gave; it is never changed.
type material struct {
	certPEM, keyPEM, caPEM []byte
	cert                   *tls.Certificate
	roots                  *x509.CertPool
	id                     ID
}

// Load reads the files of a part.
func Load(files Files) (*Source, error) {
	return load(files, time.Now)
}

func load(files Files, now func() time.Time) (*Source, error) {
	if err := files.Validate(); err != nil {
		return nil, fmt.Errorf("load certificate: %w", err)
	}
	m, err := readMaterial(files)
	if err != nil {
		return nil, fmt.Errorf("load certificate: %w", err)
	}
	return &Source{files: files, id: m.id, now: now, material: m, checked: now()}, nil
}

// ID returns the part this certificate names. It never changes.
func (s *Source) ID() ID { return s.id }

// ReloadError returns why the newest files are not in use, or nil.
func (s *Source) ReloadError() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.reloadErr
}

// Expires returns when the certificate in use ends.
func (s *Source) Expires() time.Time {
	return s.current().cert.Leaf.NotAfter
}

// current returns the material in use, after looking at the files if that is due.
func (s *Source) current() material {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	if now.Sub(s.checked) < recheck {
		return s.material
	}
	s.checked = now
	m, err := readMaterial(s.files)
	if err == nil && m.id != s.id {
		err = fmt.Errorf("certificate names %s, was %s", m.id, s.id)
	}
	s.reloadErr = err
	if err == nil && !m.equal(s.material) {
		s.material = m
	}
	return s.material
}

func (m material) equal(o material) bool {
	return bytes.Equal(m.certPEM, o.certPEM) && bytes.Equal(m.keyPEM, o.keyPEM) && bytes.Equal(m.caPEM, o.caPEM)
}

func readMaterial(files Files) (material, error) {
	var m material
	for _, f := range []struct {
		path string
		into *[]byte
	}{{files.Cert, &m.certPEM}, {files.Key, &m.keyPEM}, {files.CA, &m.caPEM}} {
		data, err := os.ReadFile(f.path)
		if err != nil {
			return material{}, fmt.Errorf("read: %w", err)
		}
		*f.into = data
	}
	cert, err := tls.X509KeyPair(m.certPEM, m.keyPEM)
	if err != nil {
		return material{}, fmt.Errorf("read %s and %s: %w", files.Cert, files.Key, err)
	}
	if m.id, err = certificateID(cert.Leaf); err != nil {
		return material{}, fmt.Errorf("read %s: %w", files.Cert, err)
	}
	m.cert = &cert
	m.roots = x509.NewCertPool()
	if !m.roots.AppendCertsFromPEM(m.caPEM) {
		return material{}, fmt.Errorf("read %s: no certificate in it", files.CA)
	}
	return m, nil
}
