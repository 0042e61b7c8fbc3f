// SPDX-License-Identifier: Apache-2.0

package policysync

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/weirmesh/weir/services/agent/internal/desired"
	"github.com/weirmesh/weir/services/agent/internal/statefile"
)

// The state on disk.
const (
	stateKind    = "policy-state"
	stateVersion = 2
	// saveInterval bounds how much disk a busy cluster takes; a change younger than this is missing after a kill, and comes again with the
	// next stream.
	saveInterval = 2 * time.Second
)

type stateFile struct {
	Time       time.Time            `json:"time"`
	Nodes      []*desired.Node      `json:"nodes,omitempty"`
	Identities []*desired.Identity  `json:"identities,omitempty"`
	Namespaces []*desired.Namespace `json:"namespaces,omitempty"`
	Peers      []*desired.Peer      `json:"peers,omitempty"`
	Selectors  []*desired.Selector  `json:"selectors,omitempty"`
	Policies   []*desired.Policy    `json:"policies,omitempty"`
	Subjects   []*desired.Subject   `json:"subjects,omitempty"`
	Endpoints  []*desired.Endpoint  `json:"endpoints,omitempty"`
	Services   []*desired.Service   `json:"services,omitempty"`
	Pods       []*desired.Pod       `json:"pods,omitempty"`
}

// ReadState reads the state of the last agent, and how old it is.
func ReadState(path string) ([]desired.Upsert, time.Time, error) {
	b, err := statefile.Read(path, stateKind, stateVersion)
	if err != nil {
		return nil, time.Time{}, err
	}
	all, at, err := decodeState(b)
	if err != nil {
		return nil, time.Time{}, fmt.Errorf("read %s: %w", path, err)
	}
	return all, at, nil
}

func decodeState(b []byte) ([]desired.Upsert, time.Time, error) {
	var f stateFile
	if err := json.Unmarshal(b, &f); err != nil {
		return nil, time.Time{}, fmt.Errorf("%w: %w", statefile.ErrDamaged, err)
	}
	var all []desired.Upsert
	err := errors.Join(
		load(&all, f.Nodes, desired.KindNode, func(x *desired.Node) string { return x.Name }),
		load(&all, f.Identities, desired.KindIdentity, func(x *desired.Identity) string { return fmt.Sprint(x.Number) }),
		load(&all, f.Namespaces, desired.KindNamespace, func(x *desired.Namespace) string { return x.Name }),
		load(&all, f.Peers, desired.KindPeer, func(x *desired.Peer) string { return x.Key }),
		load(&all, f.Selectors, desired.KindSelector, func(x *desired.Selector) string { return x.Key }),
		load(&all, f.Policies, desired.KindPolicy, func(x *desired.Policy) string { return x.Key }),
		load(&all, f.Subjects, desired.KindSubject, func(x *desired.Subject) string { return x.Key }),
		load(&all, f.Endpoints, desired.KindEndpoint, func(x *desired.Endpoint) string { return x.UID }),
		load(&all, f.Services, desired.KindService, func(x *desired.Service) string { return x.Namespace + "/" + x.Name }),
		load(&all, f.Pods, desired.KindPod, func(x *desired.Pod) string { return x.UID }),
	)
	for _, p := range f.Policies {
		if err == nil && !p.Whole() {
			err = fmt.Errorf("policy %s: %w", p.Key, statefile.ErrDamaged)
		}
	}
	if err != nil {
		return nil, time.Time{}, err
	}
	return all, f.Time, nil
}

// load adds the resources of a kind.
func load[T any](all *[]desired.Upsert, list []*T, kind desired.Kind, name func(*T) string) error {
	for _, x := range list {
		if x == nil {
			return fmt.Errorf("an empty resource: %w", statefile.ErrDamaged)
		}
		*all = append(*all, desired.Upsert{Key: desired.Key{Kind: kind, Name: name(x)}, Resource: x})
	}
	return nil
}

// Load reads the last state from disk into the store and the sink. No file is not an error. Call it before Run.
func (c *Client) Load() error {
	if c.cfg.StateFile == "" {
		return nil
	}
	all, at, err := ReadState(c.cfg.StateFile)
	if err != nil {
		return err
	}
	c.setStatus(func(s *Status) { s.StateTime = at })
	if err := c.cfg.Sink.Apply(c.cfg.Store.Apply(all, nil), true); err != nil {
		return fmt.Errorf("apply the state on disk: %w", err)
	}
	return nil
}

// keepSaved writes the state now and then while it changes, and a last time at the end.
func (c *Client) keepSaved(ctx context.Context) error {
	tick := time.NewTicker(saveInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			c.save()
			return nil
		case <-tick.C:
			c.save()
		}
	}
}

func (c *Client) save() {
	c.mu.Lock()
	// A state that is not complete would lose, at the next start, what this stream has not sent yet.
	due := c.dirty && c.status.Complete && c.cfg.StateFile != ""
	if due {
		c.dirty = false
	}
	c.mu.Unlock()
	if !due {
		return
	}
	f := stateFile{Time: c.cfg.Now()}
	for _, u := range c.cfg.Store.All() {
		switch x := u.Resource.(type) {
		case *desired.Node:
			f.Nodes = append(f.Nodes, x)
		case *desired.Identity:
			f.Identities = append(f.Identities, x)
		case *desired.Namespace:
			f.Namespaces = append(f.Namespaces, x)
		case *desired.Peer:
			f.Peers = append(f.Peers, x)
		case *desired.Selector:
			f.Selectors = append(f.Selectors, x)
		case *desired.Policy:
			f.Policies = append(f.Policies, x)
		case *desired.Subject:
			f.Subjects = append(f.Subjects, x)
		case *desired.Endpoint:
			f.Endpoints = append(f.Endpoints, x)
		case *desired.Service:
			f.Services = append(f.Services, x)
		case *desired.Pod:
			f.Pods = append(f.Pods, x)
		}
	}
	b, err := json.Marshal(f)
	if err == nil {
		err = statefile.Write(c.cfg.StateFile, stateKind, stateVersion, b)
	}
	if err != nil {
		c.log.Error("state was not saved", "error", err)
		c.mu.Lock()
		c.dirty = true
		c.mu.Unlock()
	}
}
