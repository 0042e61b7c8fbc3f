// SPDX-License-Identifier: Apache-2.0

package httpproxy

import (
	"fmt"
	"net/http"
	"time"

	mutationv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/header_mutation/v3"
	ratelimitv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/local_ratelimit/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/weirmesh/weir/services/proxy/internal/fields"
	"github.com/weirmesh/weir/services/proxy/internal/match"
	"github.com/weirmesh/weir/services/proxy/internal/mutation"
	"github.com/weirmesh/weir/services/proxy/internal/ratelimit"
	"github.com/weirmesh/weir/services/proxy/internal/rbac"
)

// filter is one of the chain before the router.
type filter struct {
	name     string
	disabled bool
	do       stage
}

// stage does a filter's work: false = it has answered, and the request goes no further.
type stage interface {
	request(x *exchange) bool
}

func (c *config) compileFilters(h *hcmv3.HttpConnectionManager) error {
	list := h.GetHttpFilters()
	for i, f := range list {
		path := fields.Index("", "http_filters", i)
		if err := fields.Only(f, path, "name", "typed_config", "is_optional", "disabled"); err != nil {
			return err
		}
		msg, err := f.GetTypedConfig().UnmarshalNew()
		if err != nil {
			return fmt.Errorf("%s: %w", fields.Join(path, "typed_config"), err)
		}
		if r, ok := msg.(*routerv3.Router); ok {
			if i != len(list)-1 {
				return fmt.Errorf("%s: the router must stand last", path)
			}
			return fields.Only(r, fields.Join(path, "typed_config"), "suppress_envoy_headers", "dynamic_stats", "respect_expected_rq_timeout",
				"suppress_grpc_request_failure_code_stats")
		}
		s, err := compiler{c.matchers}.stage(f.GetName(), msg, fields.Join(path, "typed_config"))
		if err != nil {
			return err
		}
		c.filters = append(c.filters, filter{name: f.GetName(), disabled: f.GetDisabled(), do: s})
	}
	return fmt.Errorf("http_filters: no router at the end")
}

// compiler compiles the parts of a connection manager, and what routes have for them.
type compiler struct{ *match.Compiler }

// stage compiles a filter's configuration, of the chain or of a route.
func (x compiler) stage(name string, msg any, path string) (stage, error) {
	switch m := msg.(type) {
	case *rbacv3.RBAC:
		return x.rbac(m, path)
	case *rbacv3.RBACPerRoute:
		if m.GetRbac() == nil {
			return rbacStage{}, nil
		}
		return x.rbac(m.GetRbac(), fields.Join(path, "rbac"))
	case *mutationv3.HeaderMutation:
		if m.GetMostSpecificHeaderMutationsWins() {
			return nil, fields.NotSupported(fields.Join(path, "most_specific_header_mutations_wins"))
		}
		return compileMutation(m.GetMutations(), fields.Join(path, "mutations"))
	case *mutationv3.HeaderMutationPerRoute:
		return compileMutation(m.GetMutations(), fields.Join(path, "mutations"))
	case *ratelimitv3.LocalRateLimit:
		l, err := ratelimit.Compile(m, path, time.Now())
		return rateStage{l}, err
	}
	return nil, fmt.Errorf("%s: filter %q of type %T is not supported", path, name, msg)
}

// override compiles what a route has for a filter.
func (x compiler) override(name string, config *anypb.Any, path string) (any, error) {
	msg, err := config.UnmarshalNew()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return x.stage(name, msg, path)
}

type rbacStage struct{ rules, shadow *rbac.Rules }

func (x compiler) rbac(c *rbacv3.RBAC, path string) (stage, error) {
	if err := fields.Only(c, path, "rules", "shadow_rules", "rules_stat_prefix", "shadow_rules_stat_prefix", "track_per_rule_stats"); err != nil {
		return nil, err
	}
	rules, err := rbac.Compile(c.GetRules(), x.Compiler, fields.Join(path, "rules"))
	if err != nil {
		return nil, err
	}
	shadow, err := rbac.Compile(c.GetShadowRules(), x.Compiler, fields.Join(path, "shadow_rules"))
	return rbacStage{rules, shadow}, err
}

func (s rbacStage) request(x *exchange) bool {
	if s.shadow != nil {
		if name, ok := s.shadow.Match(&x.q); ok {
			x.entry.Policy = name
		}
	}
	name, ok := s.rules.Allow(&x.q)
	if ok {
		if x.entry.Policy == "" {
			x.entry.Policy = name
		}
		return true
	}
	x.entry.Denied = true
	if name == "" {
		name = "none"
	}
	x.reply(http.StatusForbidden, "RBAC: access denied", "", "rbac_access_denied_matched_policy["+name+"]")
	return false
}

type mutationStage struct{ req, resp mutation.List }

func compileMutation(m *mutationv3.Mutations, path string) (stage, error) {
	if err := fields.Only(m, path, "request_mutations", "response_mutations"); err != nil {
		return nil, err
	}
	req, err := mutation.CompileMutations(m.GetRequestMutations(), path, "request_mutations")
	if err != nil {
		return nil, err
	}
	resp, err := mutation.CompileMutations(m.GetResponseMutations(), path, "response_mutations")
	return mutationStage{req, resp}, err
}

func (s mutationStage) request(x *exchange) bool {
	s.req.Apply(x.q.Header, &x.q)
	if len(s.resp) > 0 {
		x.onResponse = append(x.onResponse, s.resp)
	}
	return true
}

type rateStage struct{ limit *ratelimit.Limit }

func (s rateStage) request(x *exchange) bool {
	if s.limit.Allow(x.entry.Start, pick) {
		return true
	}
	x.m.env.Limits.Refused(x.s.conn.Namespace, "rate-limit")
	x.onResponse = append(x.onResponse, s.limit.Response)
	x.reply(s.limit.Status, "local_rate_limited", "RL", "local_rate_limited")
	return false
}
