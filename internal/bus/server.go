// SPDX-License-Identifier: Apache-2.0

package bus

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"time"

	natsserver "github.com/nats-io/nats-server/v2/server"

	"github.com/weirmesh/weir/internal/spiffe"
)

// ServerConfig says what an embedded NATS server is.
type ServerConfig struct {
	// Listen is the TCP address; port 0 = any free one (see Server.URL).
	Listen string
	// StoreDir is the folder of JetStream's files.
	StoreDir string
	// TLS is the server's certificate (service "nats"). Nil = plain and open to all, for tests.
	TLS *spiffe.Source
	// SyncAlways makes JetStream wait for the disk before it acknowledges.
	SyncAlways bool
	// MaxStore is what JetStream may use of the disk, in bytes; 0 = 4 GiB.
	MaxStore int64
	// Log receives what the server says; nil = nothing.
	Log *slog.Logger
}

// readyTimeout covers the recovery of a large store.
const readyTimeout = 30 * time.Second

// Server is an embedded NATS server with JetStream.
type Server struct {
	nats   *natsserver.Server
	scheme string
}

// NewServer starts a server and returns when it takes connections. Stop it with Shutdown.
func NewServer(config ServerConfig) (*Server, error) {
	host, portText, err := net.SplitHostPort(config.Listen)
	if err != nil {
		return nil, fmt.Errorf("nats server: listen address: %w", err)
	}
	port, err := strconv.ParseUint(portText, 10, 16)
	if err != nil {
		return nil, fmt.Errorf("nats server: port of %q: %w", config.Listen, err)
	}
	if config.StoreDir == "" {
		return nil, errors.New("nats server: store folder is empty")
	}
	if config.MaxStore == 0 {
		config.MaxStore = 4 << 30
	}
	options := &natsserver.Options{
		ServerName:         "weir-nats",
		Host:               host,
		Port:               int(port),
		NoSigs:             true,
		JetStream:          true,
		StoreDir:           config.StoreDir,
		SyncAlways:         config.SyncAlways,
		JetStreamMaxMemory: 64 << 20,
		JetStreamMaxStore:  config.MaxStore,
		MaxPayload:         MaxPayload,
		NoSystemAccount:    true,
	}
	if port == 0 {
		options.Port = natsserver.RANDOM_PORT
	}
	scheme := "nats"
	if config.TLS != nil {
		scheme = "tls"
		options.TLS = true
		options.TLSVerify = true
		options.TLSMap = true
		options.TLSHandshakeFirst = true
		options.TLSTimeout = 5
		options.TLSConfig = config.TLS.ServerTLS()
		options.Users = users(config.TLS.ID().TrustDomain)
	}
	server, err := natsserver.NewServer(options)
	if err != nil {
		return nil, fmt.Errorf("nats server: %w", err)
	}
	if config.Log != nil {
		server.SetLoggerV2(&logger{log: config.Log.With("component", "nats")}, false, false, false)
	}
	server.Start()
	if !server.ReadyForConnections(readyTimeout) {
		server.Shutdown()
		server.WaitForShutdown()
		return nil, fmt.Errorf("nats server: not ready on %s after %s", config.Listen, readyTimeout)
	}
	return &Server{nats: server, scheme: scheme}, nil
}

// URL returns what clients connect to.
func (s *Server) URL() string {
	return s.scheme + "://" + s.nats.Addr().String()
}

// Run waits for ctx, then shuts down.
func (s *Server) Run(ctx context.Context) error {
	<-ctx.Done()
	s.Shutdown()
	return nil
}

// Shutdown stops the server and returns when its files are closed. It may be called more than once.
func (s *Server) Shutdown() {
	s.nats.Shutdown()
	s.nats.WaitForShutdown()
}

// logger hands the server's words on to slog. NATS speaks of every connection at notice level, so
// that becomes debug.
type logger struct{ log *slog.Logger }

func (l *logger) Noticef(format string, v ...any) { l.log.Debug(fmt.Sprintf(format, v...)) }
func (l *logger) Warnf(format string, v ...any)   { l.log.Warn(fmt.Sprintf(format, v...)) }
func (l *logger) Fatalf(format string, v ...any)  { l.log.Error(fmt.Sprintf(format, v...)) }
func (l *logger) Errorf(format string, v ...any)  { l.log.Error(fmt.Sprintf(format, v...)) }
func (l *logger) Debugf(format string, v ...any)  { l.log.Debug(fmt.Sprintf(format, v...)) }
func (l *logger) Tracef(format string, v ...any)  { l.log.Debug(fmt.Sprintf(format, v...)) }
