// SPDX-License-Identifier: Apache-2.0

package flowfilter

import (
	"errors"
	"fmt"
	"strings"

	"github.com/weirmesh/weir/gen/flow"
)

// namespaces become part of pod and service names, since a FlowFilter has no
// field for them: "ns/" is a whole namespace, "/" any namespace.
type namespaces []string

func (ns namespaces) applySource(f *flow.FlowFilter) {
	if len(ns) == 0 {
		return
	}
	if len(f.SourcePod) == 0 && len(f.SourceService) == 0 {
		f.SourcePod = []string{""}
	}
	f.SourcePod = ns.prefix(f.SourcePod)
	f.SourceService = ns.prefix(f.SourceService)
}

func (ns namespaces) applyDestination(f *flow.FlowFilter) {
	if len(ns) == 0 {
		return
	}
	if len(f.DestinationPod) == 0 && len(f.DestinationService) == 0 {
		f.DestinationPod = []string{""}
	}
	f.DestinationPod = ns.prefix(f.DestinationPod)
	f.DestinationService = ns.prefix(f.DestinationService)
}

// prefix puts every namespace onto every name that has none.
func (ns namespaces) prefix(names []string) []string {
	var out []string
	for _, name := range names {
		if strings.Contains(name, "/") {
			out = append(out, name)
			continue
		}
		for _, n := range ns {
			out = append(out, n+"/"+name)
		}
	}
	return out
}

func (ns namespaces) conflict(names []string) error {
	for _, n := range ns {
		for _, name := range names {
			if own := namespaceOf(name); own != "" && own != n {
				return fmt.Errorf("namespace conflict: %q does not contain %q", n, name)
			}
		}
	}
	return nil
}

func namespaceOf(name string) string {
	ns, _, ok := strings.Cut(name, "/")
	if !ok {
		return ""
	}
	return ns
}

func (l *list) checkNamespaces() error {
	for _, f := range []*flow.FlowFilter{l.left, l.right} {
		if err := errors.Join(
			l.either.conflict(f.SourcePod),
			l.either.conflict(f.SourceService),
			l.either.conflict(f.DestinationPod),
			l.either.conflict(f.DestinationService),
			l.source.conflict(f.SourcePod),
			l.source.conflict(f.SourceService),
			l.destination.conflict(f.DestinationPod),
			l.destination.conflict(f.DestinationService),
			podsAgainstServices(f.SourcePod, f.SourceService),
			podsAgainstServices(f.DestinationPod, f.DestinationService),
		); err != nil {
			return err
		}
	}
	return nil
}

// podsAgainstServices refuses a pod and a service of one side in two namespaces: nothing could match.
func podsAgainstServices(pods, services []string) error {
	for _, pod := range pods {
		ns := namespaceOf(pod)
		if ns == "" {
			continue
		}
		for _, service := range services {
			if namespaceOf(service) != ns {
				return fmt.Errorf("namespace of service %q conflict with pod %q", service, ns)
			}
		}
	}
	return nil
}
