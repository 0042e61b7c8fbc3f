// SPDX-License-Identifier: Apache-2.0

package spiffe

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/url"
	"time"
)

// caValidity is how long a CA of the lab or of a test lives.
const caValidity = 365 * 24 * time.Hour

// backdate lets certificates be used at once by machines whose clocks are slow.
const backdate = 5 * time.Minute

// CA issues certificates of one trust domain. Its key exists in memory only. Safe for concurrent use.
type CA struct {
	trustDomain string
	cert        *x509.Certificate
	key         *ecdsa.PrivateKey
}

// NewCA makes a CA with a new key.
func NewCA(trustDomain string) (*CA, error) {
	if err := checkName("trust domain", trustDomain, 255, false); err != nil {
		return nil, fmt.Errorf("new ca: %w", err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("new ca: generate key: %w", err)
	}
	serial, err := newSerial()
	if err != nil {
		return nil, fmt.Errorf("new ca: %w", err)
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{Organization: []string{"Weir"}, CommonName: trustDomain},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(caValidity),
		URIs:                  []*url.URL{{Scheme: "spiffe", Host: trustDomain}},
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("new ca: sign: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("new ca: read back: %w", err)
	}
	return &CA{trustDomain: trustDomain, cert: cert, key: key}, nil
}

// CertPEM returns the CA's certificate, which every part needs as its trust bundle.
func (ca *CA) CertPEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.cert.Raw})
}

// Issue makes a key (ECDSA P-256) and a certificate for a part, good for both ends of a
// connection. An empty trust domain means the CA's own; another one is refused.
func (ca *CA) Issue(id ID, validity time.Duration) (certPEM, keyPEM []byte, err error) {
	if id.TrustDomain == "" {
		id.TrustDomain = ca.trustDomain
	}
	if err := id.validate(); err != nil {
		return nil, nil, fmt.Errorf("issue %s: %w", id, err)
	}
	if id.TrustDomain != ca.trustDomain {
		return nil, nil, fmt.Errorf("issue %s: trust domain of the ca is %s", id, ca.trustDomain)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("issue %s: generate key: %w", id, err)
	}
	serial, err := newSerial()
	if err != nil {
		return nil, nil, fmt.Errorf("issue %s: %w", id, err)
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber:          serial,
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(validity),
		URIs:                  []*url.URL{id.url()},
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
		// No subject: a verifier must then treat the URI name as critical (RFC 5280, 4.2.1.6).
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, key.Public(), ca.key)
	if err != nil {
		return nil, nil, fmt.Errorf("issue %s: sign: %w", id, err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, nil, fmt.Errorf("issue %s: encode key: %w", id, err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), nil
}

func newSerial() (*big.Int, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("draw serial number: %w", err)
	}
	return serial, nil
}
