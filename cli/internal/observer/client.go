// SPDX-License-Identifier: Apache-2.0

// Package observer dials a server of Hubble's or Weir's flow API, and says in
// plain words why a call to it failed.
package observer

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
)

// DefaultServer is where an observer listens.
const DefaultServer = "localhost:4245"

// maxMessage bounds one answer; the list of a large cluster's nodes is the largest.
const maxMessage = 64 << 20

// window is how much the server may send ahead of our reading, in bytes.
const window = 4 << 20

// Config says which server, and how to speak to it.
type Config struct {
	// Server is a gRPC target: host:port, unix:///path, or either behind tls://.
	Server string
	// Timeout bounds the making of a connection, RequestTimeout a call that is no stream.
	Timeout, RequestTimeout time.Duration

	TLS           bool
	AllowInsecure bool
	CACertFiles   []string
	CertFile      string
	KeyFile       string
	ServerName    string

	BasicUser, BasicPassword string
}

// Register adds the server's flags to fs.
func (c *Config) Register(fs *pflag.FlagSet) {
	fs.StringVar(&c.Server, "server", DefaultServer, "Address of the observer: host:port, unix:///path; tls:// in front turns TLS on")
	fs.DurationVar(&c.Timeout, "timeout", 5*time.Second, "Time to connect")
	fs.DurationVar(&c.RequestTimeout, "request-timeout", 12*time.Second, "Time for a call that is no stream")
	fs.BoolVar(&c.TLS, "tls", false, "Use TLS")
	fs.BoolVar(&c.AllowInsecure, "tls-allow-insecure", false, "Do not verify the server's certificate: anyone in between can read and change")
	fs.StringSliceVar(&c.CACertFiles, "tls-ca-cert-files", nil, "PEM files of the certificate authorities to trust, in place of the system's")
	fs.StringVar(&c.CertFile, "tls-client-cert-file", "", "PEM file of the client's certificate")
	fs.StringVar(&c.KeyFile, "tls-client-key-file", "", "PEM file of the client's key")
	fs.StringVar(&c.ServerName, "tls-server-name", "", "Name to expect in the server's certificate")
	fs.StringVar(&c.BasicUser, "basic-auth-username", "", "User name for basic authentication; needs TLS")
	fs.StringVar(&c.BasicPassword, "basic-auth-password", "", "Password for basic authentication")
}

// Validate reports every fault of the flags together.
func (c *Config) Validate() error {
	var faults []error
	useTLS := c.TLS || strings.HasPrefix(c.Server, "tls://")
	switch {
	case (c.CertFile == "") != (c.KeyFile == ""):
		faults = append(faults, errors.New("invalid flag(s): certificate and private key are both required, but only one was provided"))
	case c.CertFile != "" && !useTLS:
		faults = append(faults, errors.New("invalid flag(s): transport layer security required"))
	}
	switch {
	case (c.BasicUser == "") != (c.BasicPassword == ""):
		faults = append(faults, errors.New("invalid flag(s): user name and password are both required, but only one was provided"))
	case c.BasicUser != "" && !useTLS:
		faults = append(faults, errors.New("invalid flag(s): basic authentication needs transport layer security"))
	}
	if c.Server == "" || c.Server == "tls://" {
		faults = append(faults, errors.New("invalid flag(s): --server must not be empty"))
	}
	if c.Timeout <= 0 || c.RequestTimeout <= 0 {
		faults = append(faults, errors.New("invalid flag(s): timeouts must be greater than 0"))
	}
	return errors.Join(faults...)
}

// Dial makes a client connection; it connects with the first call. The caller closes it.
func (c *Config) Dial(extra ...grpc.DialOption) (*grpc.ClientConn, error) {
	target, secure := strings.CutPrefix(c.Server, "tls://")
	options := []grpc.DialOption{
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.DefaultConfig, MinConnectTimeout: c.Timeout}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
		// The 64 KiB that gRPC starts with are some 70 flows: on a busy machine, each such turn waits for both processes to be scheduled.
		grpc.WithInitialWindowSize(window), grpc.WithInitialConnWindowSize(window),
	}
	if c.TLS || secure {
		config, err := c.tls()
		if err != nil {
			return nil, err
		}
		options = append(options, grpc.WithTransportCredentials(credentials.NewTLS(config)))
	} else {
		options = append(options, grpc.WithTransportCredentials(insecure.NewCredentials()))
	}
	if c.BasicUser != "" {
		options = append(options, grpc.WithPerRPCCredentials(basicAuth(c.BasicUser+":"+c.BasicPassword)))
	}
	conn, err := grpc.NewClient(target, append(options, extra...)...)
	if err != nil {
		return nil, fmt.Errorf("invalid --server %q: %w", c.Server, err)
	}
	return conn, nil
}

func (c *Config) tls() (*tls.Config, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: c.ServerName, InsecureSkipVerify: c.AllowInsecure}
	if len(c.CACertFiles) > 0 {
		config.RootCAs = x509.NewCertPool()
		for _, name := range c.CACertFiles {
			pem, err := os.ReadFile(name)
			if err != nil {
				return nil, fmt.Errorf("read --tls-ca-cert-files: %w", err)
			}
			if !config.RootCAs.AppendCertsFromPEM(pem) {
				return nil, fmt.Errorf("read --tls-ca-cert-files: %s holds no PEM certificate", name)
			}
		}
	}
	if c.CertFile != "" {
		pair, err := tls.LoadX509KeyPair(c.CertFile, c.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("load the client's certificate: %w", err)
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return config, nil
}

// basicAuth is "user:password".
type basicAuth string

func (b basicAuth) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Basic " + base64.StdEncoding.EncodeToString([]byte(b))}, nil
}

func (b basicAuth) RequireTransportSecurity() bool { return true }
