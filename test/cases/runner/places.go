// SPDX-License-Identifier: Apache-2.0

package runner

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"

	labv1 "github.com/weirmesh/weir/gen/weir/lab/v1"
	"github.com/weirmesh/weir/test/cases/format"
	"github.com/weirmesh/weir/test/cases/live"
	"github.com/weirmesh/weir/test/cases/plan"
	"github.com/weirmesh/weir/test/cases/probe"
)

// places knows where ends are. Safe for concurrent use.
type places struct {
	plan    *plan.Plan
	lab     *live.Lab
	pods    map[string]*probe.Pod
	nodes   map[string]probe.Place
	outside probe.Place

	// dir and helper are where, and what, sockets of nodes are asked from.
	dir, helper string

	mu        sync.Mutex
	health    map[string]*healthPlace
	processes map[string]*nodeProcess
}

// nodeProcess makes sockets as a process of a node does: in its control group, whose sockets see services translated.
type nodeProcess struct {
	place   *probe.Pod
	process *live.Process
	err     error
}

type healthPlace struct {
	place *live.Health
	err   error
}

func newPlaces(dir, helper string, p *plan.Plan, lab *live.Lab, state *labv1.GetLabResponse) *places {
	ps := &places{
		plan: p, lab: lab, dir: dir, helper: helper, pods: map[string]*probe.Pod{}, nodes: map[string]probe.Place{},
		health: map[string]*healthPlace{}, processes: map[string]*nodeProcess{},
	}
	for name := range p.Pods {
		ps.pods[name] = probe.NewPod(name, socketPath(dir, name))
	}
	for _, n := range state.Nodes {
		ps.nodes[n.Name] = probe.Namespace{Title: "node:" + n.Name, Path: n.Netns}
	}
	for _, h := range state.Hosts {
		if h.Name == plan.OutsideHost {
			ps.outside = probe.Namespace{Title: "outside", Path: h.Netns}
		}
	}
	return ps
}

func (ps *places) close() {
	for _, p := range ps.pods {
		p.Close()
	}
	ps.mu.Lock()
	defer ps.mu.Unlock()
	for _, h := range ps.health {
		if h.place != nil {
			h.place.Close()
		}
	}
	for _, p := range ps.processes {
		if p.process != nil {
			p.place.Close()
			p.process.Close()
		}
	}
}

// process is a process of a node.
func (ps *places) process(node string) (probe.Place, error) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	p := ps.processes[node]
	if p == nil {
		p = new(nodeProcess)
		path := socketPath(ps.dir, "node."+node)
		p.place = probe.NewPod("process of "+node, path)
		p.process, p.err = ps.lab.Start("node/"+node, ps.helper, path)
		ps.processes[node] = p
	}
	return p.place, p.err
}

// spot is an end that was found: where sockets are made, where they are waited for, and its addresses.
type spot struct {
	// from makes sockets of clients, at those of servers.
	from, at probe.Place
	addrs    []netip.Addr
	// managed ends make flows.
	managed bool
}

// find finds an end other than a service. Near is the node of the other end, whose health endpoint "entity:health" is.
func (ps *places) find(ctx context.Context, e format.End, near string) (*spot, error) {
	switch e.Kind {
	case format.PodEnd:
		return ps.pod(e.Name)
	case format.NodeEnd:
		return ps.node(e.Name)
	case format.AddressEnd:
		return ps.address(e.Addr)
	case format.EntityEnd:
		return ps.entity(ctx, e.Name, near)
	}
	return nil, errors.New("a service is no place")
}

func (ps *places) pod(name string) (*spot, error) {
	p, ok := ps.plan.Pods[name]
	if !ok {
		return nil, fmt.Errorf("no pod %s", name)
	}
	place := ps.pods[name]
	if p.HostNetwork {
		return &spot{from: place, at: ps.nodes[p.Node], addrs: p.Addrs, managed: true}, nil
	}
	return &spot{from: place, at: place, addrs: p.Addrs, managed: true}, nil
}

func (ps *places) node(name string) (*spot, error) {
	place := ps.nodes[name]
	if place == nil {
		return nil, fmt.Errorf("no node %s", name)
	}
	return &spot{from: place, at: place, addrs: ps.plan.Nodes[name].Addrs}, nil
}

// address is who has an address: a pod, a node, or the host outside.
func (ps *places) address(a netip.Addr) (*spot, error) {
	for name, p := range ps.plan.Pods {
		if !p.HostNetwork && slices.Contains(p.Addrs, a) {
			s, err := ps.pod(name)
			if err == nil {
				s.addrs = []netip.Addr{a}
			}
			return s, err
		}
	}
	for name, n := range ps.plan.Nodes {
		if slices.Contains(n.Addrs, a) {
			return ps.node(name)
		}
	}
	if ps.outside == nil {
		return nil, fmt.Errorf("nobody has %s", a)
	}
	return &spot{from: ps.outside, at: ps.outside, addrs: []netip.Addr{a}}, nil
}

func (ps *places) entity(ctx context.Context, name, near string) (*spot, error) {
	if name == "health" {
		ps.mu.Lock()
		defer ps.mu.Unlock()
		h := ps.health[near]
		if h == nil {
			h = new(healthPlace)
			h.place, h.err = ps.lab.Health(ctx, near)
			ps.health[near] = h
		}
		if h.err != nil {
			return nil, h.err
		}
		return &spot{from: h.place, at: h.place, addrs: h.place.Addrs, managed: true}, nil
	}
	if pod := ps.plan.Entities[name]; pod != "" {
		s, err := ps.pod(pod)
		if err == nil && name == "unmanaged" {
			s.managed = false
		}
		return s, err
	}
	return nil, fmt.Errorf("a lab has no %s", name)
}

// nodeOf is the node of an end; "" = none, or it does not matter.
func (ps *places) nodeOf(e format.End) string {
	switch e.Kind {
	case format.PodEnd:
		return ps.plan.Pods[e.Name].Node
	case format.NodeEnd:
		return e.Name
	}
	return ""
}
