// SPDX-License-Identifier: Apache-2.0

package listener

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"reflect"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	"google.golang.org/protobuf/proto"

	"github.com/weirmesh/weir/services/proxy/internal/model"
)

// Config of a set of listeners.
type Config struct {
	Builder Builder
	Limits  model.Limits
	// RoutesKnown reports whether a route configuration has come.
	RoutesKnown func(name string) bool
	// Reachable reports whether a cluster is there with its endpoints.
	Reachable func(cluster string) bool
	// RoutesWait is how long a new listener waits for its routes before it opens without, and ClustersWait for the clusters that its own filters lead to;
	// 0 = 15 s and 5 s.
	RoutesWait, ClustersWait time.Duration
	// MaxConnections of one listener; 0 = no bound.
	MaxConnections int64
	// DrainTime is how long connections of a removed listener may go on.
	DrainTime time.Duration
	Log       *slog.Logger
}

// Set holds the listeners by name. Configurations come from one goroutine; the rest is safe for concurrent use.
type Set struct {
	config Config

	mu        sync.Mutex
	listeners map[string]*Listener
	waiting   map[string]*waiting // plans that are not in force yet, by listener
	inherited map[netip.AddrPort]*net.TCPListener
	draining  bool
	active    sync.WaitGroup
	removed   map[*Listener]struct{} // with connections left
}

// waiting is a plan that waits for its routes, or for an address that is taken.
type waiting struct {
	plan  *plan
	since time.Time
	err   error // of the last attempt to open it
}

// Listener is one listener in force.
type Listener struct {
	set   *Set
	name  string
	plan  atomic.Pointer[plan]
	count atomic.Int64
	total atomic.Uint64

	accepting sync.WaitGroup
	ending    sync.Once

	mu    sync.Mutex
	socks map[netip.AddrPort]*net.TCPListener
	given map[*net.TCPListener]struct{} // whose queue another listener has now
	conns map[*net.TCPConn]struct{}
}

// NewSet makes an empty set.
func NewSet(config Config) *Set {
	if config.RoutesWait == 0 {
		config.RoutesWait = 15 * time.Second
	}
	if config.ClustersWait == 0 {
		config.ClustersWait = 5 * time.Second
	}
	return &Set{
		config: config, listeners: map[string]*Listener{}, waiting: map[string]*waiting{},
		inherited: map[netip.AddrPort]*net.TCPListener{}, removed: map[*Listener]struct{}{},
	}
}

// Inherit gives the set a listening socket of the process before, which it closes if no listener wants it.
func (s *Set) Inherit(file *os.File) error {
	ln, err := adopt(file)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.inherited[addrPort(ln.Addr())] = ln
	return nil
}

// ForgetInherited closes what was inherited and is not wanted.
func (s *Set) ForgetInherited() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, ln := range s.inherited {
		errs = append(errs, ln.Close())
	}
	clear(s.inherited)
	return errors.Join(errs...)
}

// Put takes a new configuration of a listener, or refuses it and keeps the one before.
func (s *Set) Put(in *listenerv3.Listener) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("listener %q: panic: %v", in.GetName(), r)
		}
	}()
	s.mu.Lock()
	if l := s.listeners[in.GetName()]; l != nil && s.waiting[in.GetName()] == nil && proto.Equal(l.plan.Load().source, in) {
		s.mu.Unlock()
		return nil
	}
	s.mu.Unlock()
	p, err := s.config.Builder.compile(in)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.draining {
		return nil
	}
	delete(s.waiting, p.name)
	if w := (&waiting{plan: p, since: time.Now()}); s.waits(w, w.since) {
		s.waiting[p.name] = w
		return nil
	}
	if err := s.enforce(p); err != nil {
		// The address may become free: it is tried again, and the server is told meanwhile.
		s.waiting[p.name] = &waiting{plan: p, err: err}
		return err
	}
	return nil
}

// waits reports whether a plan should not be put into force yet.
func (s *Set) waits(w *waiting, now time.Time) bool {
	age := now.Sub(w.since)
	lacks := func(known func(string) bool) func(string) bool { return func(name string) bool { return !known(name) } }
	return age < s.config.RoutesWait && slices.ContainsFunc(w.plan.routes(), lacks(s.config.RoutesKnown)) ||
		age < s.config.ClustersWait && slices.ContainsFunc(w.plan.clusters(), lacks(s.config.Reachable))
}

// enforce puts a plan into force.
func (s *Set) enforce(p *plan) error {
	l := s.listeners[p.name]
	if l == nil {
		l = &Listener{
			set: s, name: p.name, socks: map[netip.AddrPort]*net.TCPListener{}, given: map[*net.TCPListener]struct{}{}, conns: map[*net.TCPConn]struct{}{},
		}
	}
	old := l.plan.Load()
	opened, err := s.openAll(l, p, old)
	if err != nil {
		return err
	}
	if old != nil {
		p.succeed(old)
	}
	l.plan.Store(p)
	s.listeners[p.name] = l
	l.mu.Lock()
	defer l.mu.Unlock()
	for address, ln := range l.socks {
		if !slices.Contains(p.addresses, address) {
			s.retire(ln)
			delete(l.socks, address)
		}
	}
	for address, ln := range opened {
		l.socks[address] = ln
		l.accepting.Add(1)
		s.active.Go(func() {
			defer l.accepting.Done()
			l.accept(ln)
		})
	}
	return nil
}

// retire makes the loop of a socket take what is queued, and close it.
func (s *Set) retire(ln *net.TCPListener) {
	if err := ln.SetDeadline(time.Unix(1, 0)); err != nil {
		s.config.Log.Warn("listening socket does not end", "address", ln.Addr().String(), "error", err)
	}
}

// find returns a socket that is there already: of the process before, or of a listener that was removed just now.
func (s *Set) find(address netip.AddrPort, spec socketSpec) (*net.TCPListener, error) {
	if ln, ok := s.inherited[address]; ok {
		delete(s.inherited, address)
		return ln, nil
	}
	for l := range s.removed {
		l.mu.Lock()
		ln := l.socks[address]
		l.mu.Unlock()
		if ln == nil || !reflect.DeepEqual(l.plan.Load().socket, spec) {
			continue
		}
		file, err := ln.File()
		if err != nil {
			return nil, err
		}
		again, err := adopt(file)
		if err == nil {
			l.mu.Lock()
			l.given[ln] = struct{}{}
			l.mu.Unlock()
		}
		l.finish()
		return again, err
	}
	return nil, nil //nolint:nilnil // there is none
}

// openAll opens the sockets that a listener lacks, all or none.
func (s *Set) openAll(l *Listener, p, old *plan) (map[netip.AddrPort]*net.TCPListener, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if old != nil && !reflect.DeepEqual(old.socket, p.socket) {
		// Options must be set before bind, and the address can not be had twice.
		for address, ln := range l.socks {
			s.closeSocket(ln)
			delete(l.socks, address)
		}
	}
	opened := map[netip.AddrPort]*net.TCPListener{}
	for _, address := range p.addresses {
		if l.socks[address] != nil || opened[address] != nil {
			continue
		}
		ln, err := s.find(address, p.socket)
		if ln == nil && err == nil {
			ln, err = open(address, p.socket)
		}
		if err != nil {
			for _, o := range opened {
				s.closeSocket(o)
			}
			return nil, err
		}
		// Port 0 is the kernel's choice: the plan's address stays what was asked for.
		opened[address] = ln
	}
	return opened, nil
}

func (s *Set) closeSocket(ln net.Listener) {
	if err := ln.Close(); err != nil {
		s.config.Log.Warn("listening socket does not close", "address", ln.Addr().String(), "error", err)
	}
}

// lastCall is how long a removed listener still accepts: what was on the way to it when the kernel's tables changed is served.
const lastCall = time.Second

// Remove takes a listener out of force: after a last call it stops accepting and HTTP is drained, and after DrainTime what is left is closed.
func (s *Set) Remove(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.waiting, name)
	l := s.listeners[name]
	if l == nil {
		return
	}
	delete(s.listeners, name)
	s.removed[l] = struct{}{}
	time.AfterFunc(lastCall, l.finish)
	time.AfterFunc(lastCall+s.config.DrainTime, func() {
		l.cut()
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.removed, l)
	})
}

// Arrived puts plans into force that waited for routes or clusters.
func (s *Set) Arrived() { s.retry(time.Now()) }

// Run tries again what could not be put into force, until ctx ends.
func (s *Set) Run(ctx context.Context) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-tick.C:
			s.retry(now)
		}
	}
}

func (s *Set) retry(now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.draining {
		return
	}
	for name, w := range s.waiting {
		if s.waits(w, now) {
			continue
		}
		err := s.enforce(w.plan)
		if err == nil {
			delete(s.waiting, name)
			continue
		}
		if w.err == nil {
			s.config.Log.Warn("listener does not open", "listener", name, "error", err)
		}
		w.err = err
	}
}

// RouteNames are the route configurations that listeners follow or wait for, sorted.
func (s *Set) RouteNames() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var names []string
	for _, l := range s.listeners {
		names = append(names, l.plan.Load().routes()...)
	}
	for _, w := range s.waiting {
		names = append(names, w.plan.routes()...)
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// Pending is how many plans wait for what the xDS server has still to send; those whose address is taken are not among them.
func (s *Set) Pending() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, w := range s.waiting {
		if w.err == nil {
			n++
		}
	}
	return n
}

// Drain stops accepting and drains what goes on, until nothing is left or ctx ends; then the rest is closed.
func (s *Set) Drain(ctx context.Context) error {
	s.mu.Lock()
	s.draining = true
	all := make([]*Listener, 0, len(s.listeners)+len(s.removed))
	for _, l := range s.listeners {
		all = append(all, l)
	}
	for l := range s.removed {
		all = append(all, l)
	}
	for _, l := range all {
		l.finish()
	}
	s.mu.Unlock()
	forgotten := s.ForgetInherited()
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.active.Wait()
	}()
	select {
	case <-done:
		return forgotten
	case <-ctx.Done():
	}
	left := 0
	for _, l := range all {
		left += l.cut()
	}
	if left > 0 {
		s.config.Log.Warn("connections were cut off when the drain ended", "connections", left)
	}
	<-done
	return forgotten
}

// Socket is a listening socket for the next process.
type Socket struct {
	Address netip.AddrPort
	File    *os.File
}

// Sockets returns copies of the listening sockets, which the caller closes.
func (s *Set) Sockets() ([]Socket, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []Socket
	for _, l := range s.listeners {
		l.mu.Lock()
		for _, ln := range l.socks {
			f, err := ln.File()
			if err != nil {
				l.mu.Unlock()
				for _, sock := range all {
					err = errors.Join(err, sock.File.Close())
				}
				return nil, fmt.Errorf("socket of listener %s: %w", l.name, err)
			}
			all = append(all, Socket{Address: addrPort(ln.Addr()), File: f})
		}
		l.mu.Unlock()
	}
	return all, nil
}

// Status is a listener as the admin port shows it.
type Status struct {
	Name, Namespace string
	Addresses       []string
	Connections     int64
	Total           uint64
	// Waiting says why it is not in force: "" = it is.
	Waiting string
	Source  *listenerv3.Listener
}

// Status returns all listeners, sorted by name.
func (s *Set) Status() []Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []Status
	for name, l := range s.listeners {
		p := l.plan.Load()
		st := Status{Name: name, Namespace: p.namespace, Connections: l.count.Load(), Total: l.total.Load(), Source: p.source}
		l.mu.Lock()
		for _, ln := range l.socks {
			st.Addresses = append(st.Addresses, ln.Addr().String())
		}
		l.mu.Unlock()
		slices.Sort(st.Addresses)
		all = append(all, st)
	}
	for name, w := range s.waiting {
		st := Status{Name: name, Namespace: w.plan.namespace, Waiting: "routes", Source: w.plan.source}
		if w.err != nil {
			st.Waiting = w.err.Error()
		}
		all = append(all, st)
	}
	slices.SortFunc(all, func(a, b Status) int {
		if a.Name < b.Name {
			return -1
		}
		return 1
	})
	return all
}

func stack() string { return string(debug.Stack()) }
