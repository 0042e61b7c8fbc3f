// SPDX-License-Identifier: Apache-2.0

// Package healthport answers load balancers on the health-check node ports of services: whether this node has backends of its own, to which traffic that
// must stay on its node can go.
package healthport

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"
)

// Service is what a port tells of.
type Service struct {
	Namespace, Name string
	// LocalEndpoints counts the ready backends on this node.
	LocalEndpoints int
}

// Server holds a listener for each port. Safe for concurrent use.
type Server struct {
	listen func(network, address string) (net.Listener, error)
	log    *slog.Logger

	mu     sync.Mutex
	ports  map[uint16]*port
	closed bool
}

type port struct {
	mu      sync.Mutex
	service Service
	server  *http.Server
	done    chan struct{}
}

// New makes a server without ports. Close it.
func New(log *slog.Logger) *Server {
	return &Server{listen: net.Listen, log: log.With("component", "healthport"), ports: map[uint16]*port{}}
}

// Set makes the ports exactly these. A port that cannot be opened is an error, and is tried again by the next Set.
func (s *Server) Set(want map[uint16]Service) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	for n, p := range s.ports {
		if _, ok := want[n]; !ok {
			p.stop()
			delete(s.ports, n)
		}
	}
	var errs []error
	for n, service := range want {
		if p := s.ports[n]; p != nil {
			p.set(service)
			continue
		}
		ln, err := s.listen("tcp", ":"+strconv.Itoa(int(n)))
		if err != nil {
			errs = append(errs, fmt.Errorf("health-check node port of %s/%s: %w", service.Namespace, service.Name, err))
			continue
		}
		s.ports[n] = s.serve(ln, service)
	}
	return errors.Join(errs...)
}

// Close ends all ports, for good.
func (s *Server) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for n, p := range s.ports {
		p.stop()
		delete(s.ports, n)
	}
}

func (s *Server) serve(ln net.Listener, service Service) *port {
	p := &port{service: service, done: make(chan struct{})}
	p.server = &http.Server{Handler: p, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: 10 * time.Second}
	go func() {
		defer close(p.done)
		if err := p.server.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
			s.log.Error("health-check node port ended", "service", service.Namespace+"/"+service.Name, "error", err)
		}
	}()
	return p
}

func (p *port) set(s Service) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.service = s
}

func (p *port) stop() {
	_ = p.server.Close() // its listener's error says nothing
	<-p.done
}

// answer has the fields that load balancers know.
type answer struct {
	Service struct {
		Namespace string `json:"namespace"`
		Name      string `json:"name"`
	} `json:"service"`
	LocalEndpoints      int  `json:"localEndpoints"`
	ServiceProxyHealthy bool `json:"serviceProxyHealthy"`
}

// ServeHTTP implements http.Handler: 200 with backends, 503 without.
func (p *port) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	p.mu.Lock()
	s := p.service
	p.mu.Unlock()
	a := answer{LocalEndpoints: s.LocalEndpoints, ServiceProxyHealthy: true}
	a.Service.Namespace, a.Service.Name = s.Namespace, s.Name
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("X-Load-Balancing-Endpoint-Weight", strconv.Itoa(s.LocalEndpoints))
	if s.LocalEndpoints == 0 {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	_ = json.NewEncoder(w).Encode(a) // the client is gone
}
