// SPDX-License-Identifier: Apache-2.0

package flowmatch

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/weirmesh/weir/gen/flow"
)

func ips(f *flow.FlowFilter) (predicate, error) {
	p, err := sides(f.GetSourceIp(), f.GetDestinationIp(), func(values []string, s side) (predicate, error) {
		return addresses(values, s.ip)
	})
	if err != nil {
		return nil, err
	}
	snat, err := addresses(f.GetSourceIpXlated(), func(f *flow.Flow) string { return f.GetIP().GetSourceXlated() })
	return join(p, snat), err
}

// addresses compares addresses as text, and CIDRs by what they contain.
func addresses(values []string, get func(*flow.Flow) string) (predicate, error) {
	return anyOf(values, func(v string) (predicate, error) {
		if strings.Contains(v, "/") {
			prefix, err := netip.ParsePrefix(v)
			if err != nil {
				return nil, fmt.Errorf("invalid IP prefix %q in filter: %w", v, err)
			}
			return func(f *flow.Flow) bool {
				a, err := netip.ParseAddr(get(f))
				return err == nil && prefix.Contains(a)
			}, nil
		}
		if _, err := netip.ParseAddr(v); err != nil {
			return nil, fmt.Errorf("invalid IP address %q in filter: %w", v, err)
		}
		return func(f *flow.Flow) bool { return get(f) == v }, nil
	})
}

func pods(f *flow.FlowFilter) (predicate, error) {
	return sides(f.GetSourcePod(), f.GetDestinationPod(), func(values []string, s side) (predicate, error) {
		return namespaced(values, func(f *flow.Flow) (string, string) {
			return s.endpoint(f).GetNamespace(), s.endpoint(f).GetPodName()
		})
	})
}

func services(f *flow.FlowFilter) (predicate, error) {
	return sides(f.GetSourceService(), f.GetDestinationService(), func(values []string, s side) (predicate, error) {
		return namespaced(values, func(f *flow.Flow) (string, string) {
			return s.service(f).GetNamespace(), s.service(f).GetName()
		})
	})
}

// namespaced matches [namespace/]prefix: without a slash the namespace is
// "default", with an empty one it is any.
func namespaced(values []string, get func(*flow.Flow) (namespace, name string)) (predicate, error) {
	return anyOf(values, func(v string) (predicate, error) {
		if v == "" {
			return nil, errors.New("invalid filter, name must not be empty")
		}
		wantNamespace, prefix, ok := strings.Cut(v, "/")
		if !ok {
			wantNamespace, prefix = "default", v
		}
		return func(f *flow.Flow) bool {
			namespace, name := get(f)
			if namespace == "" && name == "" {
				return false
			}
			return (wantNamespace == "" || namespace == wantNamespace) && strings.HasPrefix(name, prefix)
		}, nil
	})
}

func fqdns(f *flow.FlowFilter) (predicate, error) {
	return sides(f.GetSourceFqdn(), f.GetDestinationFqdn(), func(values []string, s side) (predicate, error) {
		return anyOf(values, func(v string) (predicate, error) {
			re, err := namePattern(v)
			if err != nil {
				return nil, err
			}
			return func(f *flow.Flow) bool { return slices.ContainsFunc(s.names(f), re.MatchString) }, nil
		})
	})
}

func workloads(f *flow.FlowFilter) (predicate, error) {
	one := func(s side) func(*flow.Workload) (predicate, error) {
		return func(want *flow.Workload) (predicate, error) {
			return func(f *flow.Flow) bool {
				return slices.ContainsFunc(s.endpoint(f).GetWorkloads(), func(w *flow.Workload) bool {
					return (want.GetName() == "" || want.GetName() == w.GetName()) && (want.GetKind() == "" || want.GetKind() == w.GetKind())
				})
			}, nil
		}
	}
	p, err := anyOf(f.GetSourceWorkload(), one(sourceSide))
	if err != nil {
		return nil, err
	}
	q, err := anyOf(f.GetDestinationWorkload(), one(destinationSide))
	return join(p, q), err
}

func clusters(f *flow.FlowFilter) (predicate, error) {
	return sides(f.GetSourceClusterName(), f.GetDestinationClusterName(), func(values []string, s side) (predicate, error) {
		if slices.Contains(values, "") {
			return nil, errors.New("invalid cluster name filter: the name must not be empty")
		}
		return oneOf(values, func(f *flow.Flow) string { return s.endpoint(f).GetClusterName() }), nil
	})
}

func identities(f *flow.FlowFilter) (predicate, error) {
	one := func(list []uint32, s side) predicate {
		if len(list) == 0 {
			return nil
		}
		return func(f *flow.Flow) bool {
			e := s.endpoint(f)
			return e != nil && slices.Contains(list, e.GetIdentity())
		}
	}
	return join(one(f.GetSourceIdentity(), sourceSide), one(f.GetDestinationIdentity(), destinationSide)), nil
}

func portNumbers(f *flow.FlowFilter) (predicate, error) {
	return sides(f.GetSourcePort(), f.GetDestinationPort(), func(values []string, s side) (predicate, error) {
		return anyOf(values, func(v string) (predicate, error) {
			port, err := strconv.ParseUint(v, 10, 16)
			if err != nil {
				return nil, fmt.Errorf("invalid %s port filter: invalid port %q: %w", s.name, v, err)
			}
			return func(f *flow.Flow) bool {
				l4 := layer4Ports(f)
				return l4 != nil && s.port(l4) == uint32(port)
			}, nil
		})
	})
}
