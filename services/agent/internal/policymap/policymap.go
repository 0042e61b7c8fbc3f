// SPDX-License-Identifier: Apache-2.0

// Package policymap makes the kernel's maps of policy hold what the policy service wants: for each policy a row for each peer that one of its
// selectors matches, for each endpoint its two policies. It gives policies, peers and lists of rules their numbers, keeps those on disk, and says
// what it could not put in force.
//
// A change has three steps, between which the caller writes the addresses (ipcache, endpoints). Prepare puts peers that join and new policies in
// place, so that no address ever names a peer that a policy does not know. When the new addresses are written, Switch gives endpoints their policies.
// When the addresses that go are gone, Finish takes away what left. What is missing is denied. After a restart the kernel is right and the state on
// disk may be some seconds old: until the policy service has spoken (Prune), what is pinned stays as it is, and only what is new is written.
package policymap

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/weirmesh/weir/bpf/datapath"
	"github.com/weirmesh/weir/services/agent/internal/desired"
	"github.com/weirmesh/weir/services/agent/internal/namerules"
	"github.com/weirmesh/weir/services/agent/internal/slot"
)

// Maps are the kernel's maps (datapath.Policies).
type Maps interface {
	SetPeer(policy, peer uint32, ranges []datapath.PolicyRange) error
	DeletePeer(policy, peer uint32) error
	DeletePolicy(policy uint32) error
	SetEndpoint(id uint16, e datapath.EndpointPolicy) error
	Endpoints() (map[uint16]datapath.EndpointPolicy, error)
	List() ([]datapath.PolicyRow, error)
	LookupRange(policy, peer uint32, proto uint8, port uint16) (datapath.PolicyRange, bool, error)
	Bump() error
	Usage() []datapath.MapUsage
}

// Names learns what numbers mean, for flows (flow.Directory).
type Names interface {
	SetIdentity(number uint32, labels []string)
	RemoveIdentity(number uint32)
	SetRules(number uint32, match uint8, rules []desired.PolicyRule)
	RemoveRules(number uint32)
}

// Slots numbers the filters that connections pass through (slot.Slots).
type Slots interface {
	// Of returns the number of a filter's slot, a new one if it has none.
	Of(slot.Filter) (uint16, error)
	// Get returns the slot of a number.
	Get(number uint16) (slot.Slot, bool)
	// Port is where the kernel finds its listener; 0 = nowhere.
	Port(number uint16) uint16
}

// NameRules is what weir-dns must hold (namerules.Server).
type NameRules interface {
	// SetFilter says what queries that come by a slot may ask for.
	SetFilter(slot uint16, f desired.Filter)
	// SetPolicy says what a policy allows by names. Its rows are written. No names = it has none any more.
	SetPolicy(number uint32, names []namerules.Name)
	// Gone says that a policy has no names, and that a weir-dns has said that it holds nothing of it.
	Gone(number uint32) bool
}

// Events tells what happened (event.Queue).
type Events interface {
	PolicyUpdated(labels []string, revision uint64, rules int)
	PolicyDeleted(labels []string, revision uint64, rules int)
	Notice(kind string, detail any)
}

// Config says what an Engine works on.
type Config struct {
	Maps Maps
	// NumbersFile and PausesFile keep what a new agent must find again.
	NumbersFile, PausesFile string
	Names                   Names
	Slots                   Slots
	NameRules               NameRules
	// Named are the policies that the kernel's maps of names have rows of.
	Named  []uint32
	Events Events
	Now    func() time.Time
	Log    *slog.Logger
}

// Keys of subjects that are no pods.
const (
	HostKey   = "host"
	HealthKey = "health"
)

// denyAll is a policy without rows: what an endpoint has whose own policy cannot be put in force.
const denyAll = 1

// reserve is how full, in percent, the maps may get by new policies; the rest is for peers that join policies in force.
const reserve = 95

// Engine is safe for concurrent use.
type Engine struct {
	cfg Config
	log *slog.Logger

	mu        sync.Mutex
	numbers   *numbers
	selectors map[string]*selector
	policies  map[string]*policy
	peers     map[string]*desired.Peer
	variants  map[string][]string // names of peers that an endpoint's addresses have, by pod uid
	subjects  map[string]*desired.Subject
	bound     map[string]map[uint16]struct{}     // endpoints, by subject
	force     map[uint16]datapath.EndpointPolicy // what the kernel has of bound endpoints
	pauses    map[string]Pause
	refusals  map[desired.Key]string
	changed   chan struct{} // closed and replaced when subjects change

	complete  bool                // the state has been whole once, from disk or from a policy service
	frozen    bool                // it is from disk: what is pinned is younger
	adopted   map[uint16]struct{} // endpoints that keep what is pinned while frozen
	pinned    map[uint32][]datapath.PolicyRow
	switching map[string]struct{} // subjects, for Switch
	leaving   []row               // for Finish
	removed   []*policy
	blocked   bool // some policy is
	dirty     bool // something was written since the last Bump
}

// selector is a set of peers and the policies that use it.
type selector struct {
	members map[string]struct{}
	sorted  []string // the same
	users   map[string]*policy
	known   bool // the policy service has sent it
	gone    bool // and taken it back
}

// row names a policy's row.
type row struct {
	policy *policy
	peer   string
}

// New makes an engine over what is pinned. The error says that the maps cannot be read.
func New(cfg Config) (*Engine, error) {
	e := &Engine{cfg: cfg, log: cfg.Log.With("component", "policymap"), selectors: map[string]*selector{}, policies: map[string]*policy{},
		peers: map[string]*desired.Peer{}, variants: map[string][]string{}, subjects: map[string]*desired.Subject{}, bound: map[string]map[uint16]struct{}{},
		force: map[uint16]datapath.EndpointPolicy{}, refusals: map[desired.Key]string{}, changed: make(chan struct{}),
		adopted: map[uint16]struct{}{}, switching: map[string]struct{}{}, pinned: map[uint32][]datapath.PolicyRow{}}
	rows, err := cfg.Maps.List()
	if err != nil {
		return nil, err
	}
	if e.force, err = cfg.Maps.Endpoints(); err != nil {
		return nil, err
	}
	// Nothing is pinned after the machine has started; then the state on disk is the best there is.
	e.frozen = len(rows) > 0 || len(e.force) > 0
	for _, r := range rows {
		e.pinned[r.Policy] = append(e.pinned[r.Policy], r)
	}
	e.numbers, err = loadNumbers(cfg.NumbersFile, cfg.Now)
	if err != nil {
		// New numbers are above all that is pinned, so that nothing in the kernel changes its meaning.
		e.log.Error("numbers of policies were not read; policies are written anew", "error", err)
	}
	e.numbers.raise(rows, e.force)
	e.numbers.reserve(cfg.Named)
	for n, l := range e.numbers.lists {
		cfg.Names.SetRules(n, l.match, l.rules)
	}
	if e.pauses, err = readPauses(cfg.PausesFile); err != nil {
		e.log.Error("pauses of policy were not read; none is in force", "error", err)
	}
	if err := cfg.Maps.SetPeer(denyAll, 0, nil); err != nil {
		return nil, fmt.Errorf("deny-all: %w", err)
	}
	return e, nil
}

// Prepare takes changes of the state and makes the kernel ready for the addresses that come with them. quiet: they come from disk.
func (e *Engine) Prepare(changes []desired.Change, quiet bool) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if quiet {
		e.complete = true
	}
	w := e.model(changes)
	e.save()
	var errs []error
	if !e.frozen {
		for _, r := range w.joined {
			errs = append(errs, e.writeRow(r.policy, r.peer))
		}
	}
	for _, p := range w.policies {
		errs = append(errs, e.writePolicy(p, quiet))
	}
	for _, key := range w.subjects {
		e.switching[key] = struct{}{}
	}
	return errors.Join(errs...)
}

// Place says which peers' addresses look like those of another one, since there is no room for them. Policies that judge the two apart are not given to
// endpoints that do not have them.
func (e *Engine) Place(unplaced map[string]Unplaced) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.place(unplaced)
}

// Unplaced is why a peer has no row, and whom its addresses look like.
type Unplaced struct {
	Around string
	Err    error
}

func (e *Engine) place(unplaced map[string]Unplaced) {
	if len(unplaced) == 0 && !e.blocked {
		return
	}
	e.blocked = false
	for _, p := range e.policies {
		var reason error
		for peer, u := range unplaced {
			if slices.Equal(e.positions(p, peer), e.positions(p, u.Around)) {
				continue
			}
			if err := fmt.Errorf("no room for %s: %w", strings.TrimPrefix(peer, "cidr:"), u.Err); reason == nil || err.Error() < reason.Error() {
				reason = err // one of several, always the same
			}
		}
		e.blocked = e.blocked || reason != nil
		if (reason == nil) == (p.blocked == nil) {
			continue
		}
		if p.blocked = reason; reason != nil {
			e.tellRefused(p, reason)
		}
		e.judge(p)
		for key, s := range e.subjects {
			if s.Ingress == p.key() || s.Egress == p.key() {
				e.switching[key] = struct{}{}
			}
		}
	}
}

// Switch gives the endpoints of the changes their policies. New addresses are written by then, those that go are still there: both the old and the
// new policies find all that they need.
func (e *Engine) Switch() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	var errs []error
	for key := range e.switching {
		err := e.applySubject(key)
		if err == nil {
			delete(e.switching, key)
		}
		errs = append(errs, err)
	}
	e.wake()
	return errors.Join(append(errs, e.bump())...)
}

// work is what a set of changes asks for.
type work struct {
	joined   []row
	policies []*policy
	subjects []string
}

func (w *work) policy(p *policy) {
	if !slices.Contains(w.policies, p) {
		w.policies = append(w.policies, p)
	}
}

// model takes changes into the model and says what is to be written.
func (e *Engine) model(changes []desired.Change) work {
	var w work
	moved := map[row]bool{} // true = it joined a selector, false = it only left
	touched := map[string]struct{}{}
	for _, c := range changes {
		switch c.Key.Kind {
		case desired.KindPeer:
			e.modelPeer(c)
		case desired.KindEndpoint:
			e.modelVariants(c)
		case desired.KindSelector:
			for _, p := range e.modelSelector(c, moved) {
				w.policy(p)
			}
		case desired.KindSubject:
			if s, ok := c.New.(*desired.Subject); ok {
				e.subjects[s.Key] = s
			} else {
				// Its endpoints keep what they have until they are gone too.
				delete(e.subjects, c.Key.Name)
			}
			touched[c.Key.Name] = struct{}{}
		}
	}
	// After the selectors: a policy of the same change counts their members.
	for _, c := range changes {
		if c.Key.Kind != desired.KindPolicy {
			continue
		}
		if p, changed := e.modelPolicy(c); changed {
			w.policy(p)
		}
	}
	for _, p := range w.policies {
		for key, s := range e.subjects {
			if s.Ingress == p.key() || s.Egress == p.key() {
				touched[key] = struct{}{}
			}
		}
	}
	for r, joined := range moved {
		if e.policies[r.policy.key()] != r.policy {
			continue
		}
		e.number(r.peer)
		switch {
		case !joined:
			e.leaving = append(e.leaving, r)
		case !slices.Contains(w.policies, r.policy):
			w.joined = append(w.joined, r)
		}
	}
	w.subjects = slices.Sorted(maps.Keys(touched))
	return w
}

func (e *Engine) modelPeer(c desired.Change) {
	p, ok := c.New.(*desired.Peer)
	if !ok {
		delete(e.peers, c.Key.Name)
		if n, known := e.numbers.peer(c.Key.Name); known && n >= firstLocal {
			e.cfg.Names.RemoveIdentity(n)
		}
		return
	}
	e.peers[p.Key] = p
	if n := e.number(p.Key); n >= firstLocal && len(p.Labels) > 0 {
		e.cfg.Names.SetIdentity(n, p.Labels)
	}
}

func (e *Engine) modelVariants(c desired.Change) {
	delete(e.variants, c.Key.Name)
	x, ok := c.New.(*desired.Endpoint)
	if !ok {
		return
	}
	var names []string
	for i := range x.Addresses {
		if name := x.Peer(i); name != "" {
			e.number(name)
			names = append(names, name)
		}
	}
	if names != nil {
		e.variants[c.Key.Name] = names
	}
}

// modelSelector returns the policies that have waited for it.
func (e *Engine) modelSelector(c desired.Change, moved map[row]bool) []*policy {
	s := e.selectors[c.Key.Name]
	if s == nil {
		s = &selector{members: map[string]struct{}{}, users: map[string]*policy{}}
		e.selectors[c.Key.Name] = s
	}
	x, ok := c.New.(*desired.Selector)
	s.gone = !ok
	if !ok {
		// Its policies go with it. One that stays by mistake, or since its successor does not fit, keeps its rows.
		if len(s.users) == 0 {
			delete(e.selectors, c.Key.Name)
		}
		return nil
	}
	var waited []*policy
	if !s.known {
		waited = slices.Collect(maps.Values(s.users))
	}
	s.known = true
	joined, left := difference(s.sorted, x.Members)
	for _, m := range joined {
		s.members[m] = struct{}{}
		for _, p := range s.users {
			moved[row{p, m}] = true
		}
	}
	for _, m := range left {
		delete(s.members, m)
		for _, p := range s.users {
			if r := (row{p, m}); !moved[r] {
				moved[r] = false
			}
		}
	}
	s.sorted = x.Members
	return waited
}

// difference compares two sorted lists.
func difference(old, now []string) (joined, left []string) {
	for len(old) > 0 || len(now) > 0 {
		switch {
		case len(old) == 0 || len(now) > 0 && now[0] < old[0]:
			joined, now = append(joined, now[0]), now[1:]
		case len(now) == 0 || old[0] < now[0]:
			left, old = append(left, old[0]), old[1:]
		default:
			old, now = old[1:], now[1:]
		}
	}
	return joined, left
}

// Finish takes away what left, after the addresses that named it.
func (e *Engine) Finish() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	var errs []error
	if !e.frozen {
		for _, r := range e.leaving {
			errs = append(errs, e.writeRow(r.policy, r.peer))
		}
		e.leaving = nil
		errs = append(errs, e.collectPolicies())
	}
	return errors.Join(append(errs, e.bump())...)
}

// AddressesChanged says that an address has another identity or peer than before: live connections are judged anew.
func (e *Engine) AddressesChanged() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.dirty = true
	return e.bump()
}

// Prune says that the state is complete and current: the kernel is made to hold it, and what is not part of it goes. between, if set, is called when all
// policies are written and no endpoint has got one yet.
func (e *Engine) Prune(between func()) error {
	thawed, err := e.thaw()
	errs := []error{err}
	if between != nil {
		between()
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if thawed {
		clear(e.adopted)
		for key := range e.bound {
			errs = append(errs, e.applySubject(key))
		}
	}
	errs = append(errs, e.bump(), e.collectPolicies(), e.collectStrays())
	e.wake()
	return errors.Join(errs...)
}

// thaw writes all policies, if they were left as they were pinned.
func (e *Engine) thaw() (bool, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.complete = true
	if !e.frozen {
		return false, nil
	}
	e.frozen = false
	e.leaving = nil
	var errs []error
	for _, p := range e.policies {
		errs = append(errs, e.writePolicy(p, true))
	}
	return true, errors.Join(errs...)
}

// Retry tries again what did not fit, and forgets numbers that nothing has used for long.
func (e *Engine) Retry() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	var errs []error
	if !e.frozen {
		touched := map[string]struct{}{}
		for _, p := range e.policies {
			if p.full == nil && !p.stale {
				continue
			}
			if p.unslotted != nil {
				e.encode(p)
				e.save()
			}
			errs = append(errs, e.writePolicy(p, true))
			for key, s := range e.subjects {
				if s.Ingress == p.key() || s.Egress == p.key() {
					touched[key] = struct{}{}
				}
			}
		}
		for key := range touched {
			errs = append(errs, e.applySubject(key))
		}
		errs = append(errs, e.bump(), e.collectPolicies())
		e.forgetNumbers()
	}
	return errors.Join(errs...)
}

// Refusals returns what is not in force, and why.
func (e *Engine) Refusals() map[desired.Key]string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return maps.Clone(e.refusals)
}

// Number returns the number of a peer. It is on disk when Number returns.
func (e *Engine) Number(peer string) uint32 {
	e.mu.Lock()
	defer e.mu.Unlock()
	n := e.number(peer)
	e.save()
	return n
}

func (e *Engine) number(peer string) uint32 {
	n, err := e.numbers.of(peer)
	if err != nil {
		// 0 is no peer's number: rows and addresses of it are those of everybody else, which only a name out of order gets.
		e.log.Error("a peer has no number", "peer", peer, "error", err)
	}
	return n
}

func (e *Engine) save() {
	if err := e.numbers.save(); err != nil {
		// They are good until the next restart, and then above what is pinned.
		e.log.Error("numbers of policies were not saved", "error", err)
	}
}

func (e *Engine) bump() error {
	if !e.dirty {
		return nil
	}
	if err := e.cfg.Maps.Bump(); err != nil {
		return err
	}
	e.dirty = false
	return nil
}

func (e *Engine) wake() {
	close(e.changed)
	e.changed = make(chan struct{})
}
