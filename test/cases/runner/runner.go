// SPDX-License-Identifier: Apache-2.0

// Package runner plays cases: a lab for each, real packets for each expectation, and the flows that tell of them.
package runner

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/weirmesh/weir/test/cases/format"
	"github.com/weirmesh/weir/test/cases/live"
	"github.com/weirmesh/weir/test/cases/plan"
	"github.com/weirmesh/weir/test/cases/probe"
)

// Options say how cases are played.
type Options struct {
	// Bin is the folder of Weir's programs.
	Bin string
	// Keep lets the lab of a case that failed run.
	Keep bool
	// Limit of one case.
	Limit time.Duration
}

// Run plays a case.
func Run(ctx context.Context, c *format.Case, o Options) *Result {
	began := time.Now()
	r := &Result{Case: c}
	c.Quicken()
	ctx, cancel := context.WithTimeout(ctx, o.Limit+time.Duration(c.Lasts()*float64(time.Second)))
	defer cancel()
	r.Err = play(ctx, c, o, r)
	if r.Err != nil {
		// What was not tried is not passed over.
		for i := len(r.Outcomes); i < len(c.Validation)+len(c.Expect); i++ {
			r.Outcomes = append(r.Outcomes, Outcome{What: c.ID, Class: NotRun, Detail: "the case broke off"})
		}
	}
	r.Took = time.Since(began)
	return r
}

// game is a case that is being played.
type game struct {
	c      *format.Case
	plan   *plan.Plan
	lab    *live.Lab
	flows  *live.Flows
	net    *probe.Network
	places *places
	// edited: an object that was there was changed at the time that is played.
	edited bool

	// objects are the policies in the world now, by name.
	objects []*live.Object
	// all are those of the whole case.
	all    []*live.Object
	notYet []string
}

func play(ctx context.Context, c *format.Case, o Options, r *Result) (err error) {
	dir, err := os.MkdirTemp("", "weir-cases-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	helper := filepath.Join(o.Bin, "weir-cases-pod")
	p, err := plan.New(c, func(pod string) []string { return []string{helper, socketPath(dir, pod)} })
	if err != nil {
		return err
	}
	name := live.NewName()
	begin := time.Now()
	lab, err := live.Up(ctx, o.Bin, name, dir, p.Manifests, p.Flags)
	if err != nil {
		return err
	}
	r.phase("up", begin)
	defer func() {
		begin := time.Now()
		defer func() { r.phase("down", begin) }()
		if r.Failed() || err != nil {
			r.Logs = lab.Logs()
			if o.Keep {
				r.Lab = name
				lab.Leave()
				return
			}
		}
		err = errors.Join(err, lab.Close())
	}()
	state, err := lab.State(ctx)
	if err != nil {
		return err
	}
	flows, err := live.Follow(ctx, state.Observer)
	if err != nil {
		return err
	}
	defer flows.Close()
	g := &game{c: c, plan: p, lab: lab, flows: flows, net: probe.NewNetwork(), places: newPlaces(dir, helper, p, lab, state)}
	defer g.places.close()
	defer g.net.Close()
	return g.timeline(ctx, r)
}

func socketPath(dir, pod string) string {
	return filepath.Join(dir, strings.ReplaceAll(pod, "/", ".")+".sock")
}

// load makes objects of trees.
func load(trees []yaml.Node) ([]*live.Object, error) {
	var objects []*live.Object
	for i := range trees {
		document, err := format.Document(&trees[i])
		if err != nil {
			return nil, err
		}
		objects = append(objects, &live.Object{Ref: format.RefOf(&trees[i]), Document: document})
	}
	return objects, nil
}

// apply puts objects into the world, and waits until they are in force everywhere, or refused.
func (g *game) apply(ctx context.Context, trees []yaml.Node) error {
	if len(trees) == 0 {
		return nil
	}
	objects, err := load(trees)
	if err != nil {
		return err
	}
	if err := g.lab.ApplyPolicies(ctx, objects); err != nil {
		return err
	}
	g.all = append(g.all, objects...)
	for _, o := range objects {
		had := len(g.objects)
		g.objects = slices.DeleteFunc(g.objects, func(old *live.Object) bool { return old.Ref == o.Ref })
		g.edited = g.edited || len(g.objects) < had
		g.objects = append(g.objects, o)
	}
	if err := g.lab.AwaitPolicies(ctx, g.objects); err != nil {
		return err
	}
	for _, o := range objects {
		if field := o.Status.GetNotYet(); field != "" && !g.expectRefused(o) {
			g.notYet = append(g.notYet, fmt.Sprintf("%s %s: %s", o.Ref.Kind, o.Ref, field))
		}
	}
	return nil
}

// remove takes objects out of the world.
func (g *game) remove(ctx context.Context, trees []yaml.Node) error {
	if len(trees) == 0 {
		return nil
	}
	objects, err := load(trees)
	if err != nil {
		return err
	}
	for _, o := range objects {
		if err := g.lab.Delete(ctx, o.Document); err != nil {
			return err
		}
		g.objects = slices.DeleteFunc(g.objects, func(old *live.Object) bool { return old.Ref == o.Ref })
	}
	return g.lab.AwaitListed(ctx, len(g.taken()))
}

// taken are the objects that the lab has.
func (g *game) taken() []*live.Object {
	return slices.DeleteFunc(slices.Clone(g.objects), func(o *live.Object) bool { return o.Refused != "" })
}

// withoutPolicies calls f in a world without policies, and puts them back.
func (g *game) withoutPolicies(ctx context.Context, f func()) error {
	objects := g.taken()
	for _, o := range objects {
		if err := g.lab.Delete(ctx, o.Document); err != nil {
			return err
		}
	}
	if err := g.lab.AwaitListed(ctx, 0); err != nil {
		return err
	}
	f()
	if err := g.lab.ApplyPolicies(ctx, objects); err != nil {
		return err
	}
	return g.lab.AwaitPolicies(ctx, objects)
}

// expectRefused reports whether the case itself says that the object may be refused.
func (g *game) expectRefused(o *live.Object) bool {
	return slices.ContainsFunc(g.c.Validation, func(v format.Validation) bool {
		return v.Policy != "" && names(v.Policy, o.Ref) && v.Valid != nil && !*v.Valid
	})
}

// names reports whether a case means an object: by "namespace/name", or the name alone.
func names(text string, r format.Ref) bool {
	if namespace, name, found := strings.Cut(text, "/"); found {
		return r.Name == name && (r.Namespace == namespace || r.Namespace == "" && namespace == "default")
	}
	return r.Name == text
}
