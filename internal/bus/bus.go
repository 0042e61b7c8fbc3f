// SPDX-License-Identifier: Apache-2.0

// Package bus is Weir's use of NATS: how a part connects, what streams, buckets and subjects are
// called, who may use which of them, and an embedded server for the lab and for tests.
//
// A connection is mutual TLS from its first byte. The server maps the SPIFFE URI of the client's
// certificate to a user (verify_and_map), and a user may do only what its service needs.
package bus

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/weirmesh/weir/internal/spiffe"
)

// Service is the service name in the certificate of a NATS server.
const Service = "nats"

// Names on the bus.
const (
	// FlowStream is the JetStream stream of the nodes' batches.
	FlowStream = "WEIR_FLOWS"
	// FlowSubjects is what FlowStream stores: one subject per node.
	FlowSubjects = "weir.flows.>"
	// NodeSubjects carries the relays' word of the agents that are connected to them. It is not stored.
	NodeSubjects = "weir.nodes.>"
	// IdentityBucket is the key-value bucket of the identity numbers.
	IdentityBucket = "weir-identity"
)

// Bounds of the bus.
const (
	// MaxPayload is the largest message that the embedded server takes.
	MaxPayload = 2 << 20
	// DuplicateWindow is how long JetStream remembers the ids of the messages that it stored.
	DuplicateWindow = 2 * time.Minute
)

// FlowSubject returns the subject of a node's batches.
func FlowSubject(node string) string { return "weir.flows." + node }

// NodeSubject returns the subject of what relays say of a node.
func NodeSubject(node string) string { return "weir.nodes." + node }

// Connect returns a connection that comes back by itself, forever: it succeeds when the server is
// away, too. Nothing is buffered while it is away, so that a publisher knows what was not sent.
// tlsConfig is Source.ClientTLS(Service); nil = plain, for tests. Close the connection after use.
func Connect(url string, tlsConfig *tls.Config, log *slog.Logger, options ...nats.Option) (*nats.Conn, error) {
	log = log.With("component", "bus")
	all := []nats.Option{
		nats.MaxReconnects(-1),
		nats.RetryOnFailedConnect(true),
		nats.ReconnectWait(200 * time.Millisecond),
		nats.ReconnectJitter(100*time.Millisecond, 300*time.Millisecond),
		nats.ReconnectBufSize(-1),
		nats.PingInterval(5 * time.Second),
		nats.MaxPingsOutstanding(2),
		nats.Timeout(3 * time.Second),
		nats.ConnectHandler(func(*nats.Conn) { log.Info("connected to nats") }),
		nats.ReconnectHandler(func(*nats.Conn) { log.Info("connected to nats again") }),
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) {
			if err != nil { // nil = we closed it
				log.Warn("connection to nats lost", "error", err)
			}
		}),
		nats.ErrorHandler(func(_ *nats.Conn, sub *nats.Subscription, err error) {
			subject := ""
			if sub != nil {
				subject = sub.Subject
			}
			log.Warn("nats reported an error", "subject", subject, "error", err)
		}),
	}
	if tlsConfig != nil {
		all = append(all, nats.Secure(tlsConfig), nats.TLSHandshakeFirst())
		if id, ok := clientID(tlsConfig); ok {
			all = append(all, nats.Name(id.String()), nats.CustomInboxPrefix(inbox(id.Service)))
		}
	}
	conn, err := nats.Connect(url, append(all, options...)...)
	if err != nil {
		return nil, fmt.Errorf("connect to nats at %s: %w", url, err)
	}
	return conn, nil
}

// inbox is the prefix of the subjects on which a service gets its answers; no other may listen there.
func inbox(service string) string { return "_INBOX_" + service }

// clientID reads who we are from our own certificate.
func clientID(config *tls.Config) (spiffe.ID, bool) {
	if config.GetClientCertificate == nil {
		return spiffe.ID{}, false
	}
	cert, err := config.GetClientCertificate(&tls.CertificateRequestInfo{})
	if err != nil || cert == nil || cert.Leaf == nil || len(cert.Leaf.URIs) != 1 {
		return spiffe.ID{}, false
	}
	id, err := spiffe.ParseID(cert.Leaf.URIs[0].String())
	return id, err == nil
}

// StreamConfig bounds the flow history.
type StreamConfig struct {
	// MaxAge is the age at which batches are removed; 0 = never.
	MaxAge time.Duration
	// MaxBytes is the size at which the oldest batches are removed; 0 = the server's limit.
	MaxBytes int64
	// Replicas is the number of NATS servers that hold a batch before it is acknowledged; 0 = 1.
	Replicas int
}

// EnsureFlowStream makes FlowStream, or gives the existing one these bounds.
func EnsureFlowStream(ctx context.Context, js jetstream.JetStream, config StreamConfig) (jetstream.Stream, error) {
	maxBytes := config.MaxBytes
	if maxBytes == 0 {
		maxBytes = -1
	}
	duplicates := DuplicateWindow
	if config.MaxAge > 0 {
		duplicates = min(duplicates, config.MaxAge) // the server refuses a window longer than the age
	}
	stream, err := js.CreateOrUpdateStream(ctx, jetstream.StreamConfig{
		Name:        FlowStream,
		Description: "sealed batches of flows; subject weir.flows.<node>, id <node>/<epoch>/<first>",
		Subjects:    []string{FlowSubjects},
		Storage:     jetstream.FileStorage,
		Retention:   jetstream.LimitsPolicy,
		Discard:     jetstream.DiscardOld,
		MaxAge:      config.MaxAge,
		MaxBytes:    maxBytes,
		Duplicates:  duplicates,
		Replicas:    max(config.Replicas, 1),
		DenyPurge:   true,
		DenyDelete:  true,
	})
	if err != nil {
		return nil, fmt.Errorf("ensure stream %s: %w", FlowStream, err)
	}
	return stream, nil
}

// IsNoStream reports whether an error says that the stream does not exist (yet).
func IsNoStream(err error) bool {
	return errors.Is(err, jetstream.ErrStreamNotFound) || errors.Is(err, jetstream.ErrNoStreamResponse)
}
