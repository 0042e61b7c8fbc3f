// SPDX-License-Identifier: Apache-2.0

package differential

import (
	"encoding/json"
	"maps"
	"slices"

	"go.yaml.in/yaml/v3"

	"github.com/weirmesh/weir/test/reference"
)

// Shrink takes away from a cluster, part by part, what a fault does not need. still reports whether the fault is there; it gets a copy.
func Shrink(c *reference.Cluster, still func(*reference.Cluster) bool) *reference.Cluster {
	for {
		size := sizeOf(c)
		c = shrinkLists(c, still)
		c = shrinkPolicies(c, still)
		if sizeOf(c) == size {
			return c
		}
	}
}

func sizeOf(c *reference.Cluster) int {
	raw, err := yaml.Marshal(c)
	if err != nil {
		panic(err)
	}
	return len(raw)
}

// copyOf a cluster, its objects decoded anew.
func copyOf(c *reference.Cluster) *reference.Cluster {
	out := *c
	out.Policies = nil
	for _, o := range c.Policies {
		out.Policies = append(out.Policies, decoded(o).(map[string]any))
	}
	return &out
}

func decoded(v any) any {
	raw, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	var out any
	if err := json.Unmarshal(raw, &out); err != nil {
		panic(err)
	}
	return out
}

// try makes a change to a copy and keeps it if the fault stays.
func try(c *reference.Cluster, still func(*reference.Cluster) bool, change func(*reference.Cluster)) (*reference.Cluster, bool) {
	less := copyOf(c)
	change(less)
	if still(copyOf(less)) {
		return less, true
	}
	return c, false
}

func shrinkLists(c *reference.Cluster, still func(*reference.Cluster) bool) *reference.Cluster {
	drop := func(length func() int, change func(*reference.Cluster, int)) {
		for i := length() - 1; i >= 0; i-- {
			c, _ = try(c, still, func(c *reference.Cluster) { change(c, i) })
		}
	}
	drop(func() int { return len(c.Policies) }, func(c *reference.Cluster, i int) { c.Policies = slices.Delete(c.Policies, i, i+1) })
	drop(func() int { return len(c.Pods) }, func(c *reference.Cluster, i int) { c.Pods = without(c.Pods, i) })
	drop(func() int { return len(c.Services) }, func(c *reference.Cluster, i int) { c.Services = without(c.Services, i) })
	drop(func() int { return len(c.Externals) }, func(c *reference.Cluster, i int) { c.Externals = without(c.Externals, i) })
	for i := range c.Pods {
		for _, change := range []func(*reference.Pod){
			func(p *reference.Pod) { p.Labels = nil }, func(p *reference.Pod) { p.Ports = nil }, func(p *reference.Pod) { p.ServiceAccount = "" },
		} {
			c, _ = try(c, still, func(c *reference.Cluster) {
				c.Pods = slices.Clone(c.Pods)
				change(&c.Pods[i])
			})
		}
	}
	for i := range c.Namespaces {
		c, _ = try(c, still, func(c *reference.Cluster) {
			c.Namespaces = slices.Clone(c.Namespaces)
			c.Namespaces[i].Labels = nil
		})
	}
	for _, change := range []func(*reference.Config){
		func(f *reference.Config) { f.PolicyEnforcement = "" }, func(f *reference.Config) { f.AllowLocalhost = "" },
		func(f *reference.Config) { f.HostFirewall = false }, func(f *reference.Config) { f.EnableNodeSelectorLabels = false },
		func(f *reference.Config) { f.ClusterName = "" }, func(f *reference.Config) { f.PolicyDefaultLocalCluster = nil },
		func(f *reference.Config) { f.PolicyCIDRMatchMode = nil }, func(f *reference.Config) { f.EnableNonDefaultDenyPolicies = nil },
	} {
		c, _ = try(c, still, func(c *reference.Cluster) { change(&c.Config) })
	}
	return c
}

func without[T any](s []T, i int) []T { return slices.Delete(slices.Clone(s), i, i+1) }

// shrinkPolicies takes keys and items out of the objects, from the outside in.
func shrinkPolicies(c *reference.Cluster, still func(*reference.Cluster) bool) *reference.Cluster {
	for i := range c.Policies {
		paths := pathsOf(c.Policies[i], nil)
		for _, path := range paths {
			c, _ = try(c, still, func(c *reference.Cluster) { c.Policies[i] = cut(c.Policies[i], path).(map[string]any) })
		}
	}
	return c
}

// pathsOf lists every key and item; items of a list from the last, so that a cut leaves the other paths as they are.
func pathsOf(v any, at []any) (out [][]any) {
	add := func(step, child any) {
		path := append(slices.Clone(at), step)
		out = append(out, path)
		out = append(out, pathsOf(child, path)...)
	}
	switch t := v.(type) {
	case map[string]any:
		for _, k := range slices.Sorted(maps.Keys(t)) {
			add(k, t[k])
		}
	case []any:
		for i := len(t) - 1; i >= 0; i-- {
			add(i, t[i])
		}
	}
	return out
}

// cut returns v without what is at the path; a path that is no longer there changes nothing.
func cut(v any, path []any) any {
	switch t := v.(type) {
	case map[string]any:
		k, ok := path[0].(string)
		if !ok || t[k] == nil {
			return v
		}
		if len(path) == 1 {
			delete(t, k)
		} else {
			t[k] = cut(t[k], path[1:])
		}
	case []any:
		i, ok := path[0].(int)
		if !ok || i >= len(t) {
			return v
		}
		if len(path) == 1 {
			return slices.Delete(t, i, i+1)
		}
		t[i] = cut(t[i], path[1:])
	}
	return v
}
