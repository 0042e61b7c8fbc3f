// SPDX-License-Identifier: Apache-2.0

package route

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"

	"github.com/weirmesh/weir/services/proxy/internal/fields"
	"github.com/weirmesh/weir/services/proxy/internal/match"
)

// Retry says when a request is sent again.
type Retry struct {
	on       on
	Num      int
	PerTry   time.Duration
	base     time.Duration
	max      time.Duration
	statuses []int
	grpc     []string
	requests []match.Header
	// AvoidPrevious: an endpoint that failed is not met again if others are there.
	AvoidPrevious bool
}

type on uint16

const (
	on5xx on = 1 << iota
	onGateway
	onReset
	onResetBeforeRequest
	onConnect
	on4xx
	onRefused
	onStatus
)

var conditions = map[string]on{
	"5xx": on5xx | onReset | onConnect | onRefused, "gateway-error": onGateway | onReset | onConnect | onRefused, "reset": onReset | onConnect,
	"reset-before-request": onResetBeforeRequest, "connect-failure": onConnect, "retriable-4xx": on4xx, "refused-stream": onRefused,
	"retriable-status-codes": onStatus,
}

// grpcStatuses are conditions on the gRPC status of an answer's headers.
var grpcStatuses = map[string]string{"cancelled": "1", "deadline-exceeded": "4", "internal": "13", "resource-exhausted": "8", "unavailable": "14"}

const (
	defaultBackOff = 25 * time.Millisecond
	previousHosts  = "envoy.retry_host_predicates.previous_hosts"
	maxRetries     = 100
)

func (c *compiler) retry(f *Forward, v *routev3.VirtualHost, a *routev3.RouteAction, path string) error {
	p, at := a.GetRetryPolicy(), fields.Join(path, "retry_policy")
	if p == nil {
		p, at = v.GetRetryPolicy(), "virtual_host.retry_policy"
	}
	if p == nil || p.GetRetryOn() == "" {
		return nil
	}
	var err error
	f.Retry, err = c.retryPolicy(p, at)
	return err
}

func (c *compiler) retryPolicy(p *routev3.RetryPolicy, path string) (*Retry, error) {
	if err := fields.Only(p, path, "retry_on", "num_retries", "per_try_timeout", "retry_host_predicate", "host_selection_retry_max_attempts",
		"retriable_status_codes", "retry_back_off", "retriable_request_headers"); err != nil {
		return nil, err
	}
	r := &Retry{Num: 1, PerTry: p.GetPerTryTimeout().AsDuration(), base: defaultBackOff}
	for _, on := range strings.Split(p.GetRetryOn(), ",") {
		if s, ok := grpcStatuses[strings.TrimSpace(on)]; ok {
			r.grpc = append(r.grpc, s)
			continue
		}
		bit, ok := conditions[strings.TrimSpace(on)]
		if !ok {
			return nil, fmt.Errorf("%s: %q is not supported", fields.Join(path, "retry_on"), strings.TrimSpace(on))
		}
		r.on |= bit
	}
	if p.GetNumRetries() != nil {
		r.Num = int(p.GetNumRetries().GetValue())
	}
	if r.Num > maxRetries || r.PerTry < 0 {
		return nil, fmt.Errorf("%s: out of bounds", path)
	}
	for i, h := range p.GetRetryHostPredicate() {
		if h.GetName() != previousHosts {
			return nil, fields.NotSupported(fields.Index(path, "retry_host_predicate", i))
		}
		r.AvoidPrevious = true
	}
	for _, s := range p.GetRetriableStatusCodes() {
		r.statuses = append(r.statuses, int(s))
	}
	if b := p.GetRetryBackOff(); b != nil {
		r.base, r.max = b.GetBaseInterval().AsDuration(), b.GetMaxInterval().AsDuration()
	}
	if r.max == 0 {
		r.max = 10 * r.base
	}
	if r.base <= 0 || r.max < r.base {
		return nil, fmt.Errorf("%s: intervals", fields.Join(path, "retry_back_off"))
	}
	var err error
	r.requests, err = c.matchers.Headers(p.GetRetriableRequestHeaders(), path, "retriable_request_headers")
	return r, err
}

// Failure is how an attempt ended without an answer.
type Failure uint8

// Failures of attempts.
const (
	// Connect: no connection; nothing was sent.
	Connect Failure = iota + 1
	// Refused: the server said that it did not begin.
	Refused
	// Reset: the connection ended before an answer, nothing being sure; Unsent: before the request was sent.
	Reset
	Unsent
	// PerTryTimeout: no answer in time.
	PerTryTimeout
)

// Wants reports whether requests like this one may be sent again at all.
func (r *Retry) Wants(q *match.Request) bool {
	if r == nil || r.Num == 0 {
		return false
	}
	return len(r.requests) == 0 || slices.ContainsFunc(r.requests, func(h match.Header) bool { return h.Match(q) })
}

// AfterFailure reports whether a failure is one to try again after.
func (r *Retry) AfterFailure(f Failure) bool {
	switch f {
	case Connect:
		return r.on&onConnect != 0
	case Refused:
		return r.on&(onRefused|onReset) != 0
	case Unsent:
		return r.on&(onReset|onResetBeforeRequest) != 0
	case Reset:
		return r.on&onReset != 0
	case PerTryTimeout:
		return r.on&(on5xx|onGateway|onReset) != 0
	}
	return false
}

// AfterAnswer reports whether an answer is one to try again after.
func (r *Retry) AfterAnswer(status int, h http.Header) bool {
	switch {
	case len(r.grpc) > 0 && slices.Contains(r.grpc, h.Get("Grpc-Status")):
	case r.on&on5xx != 0 && status >= 500:
	case r.on&onGateway != 0 && (status == http.StatusBadGateway || status == http.StatusServiceUnavailable || status == http.StatusGatewayTimeout):
	case r.on&on4xx != 0 && status == http.StatusConflict:
	case r.on&onStatus != 0 && slices.Contains(r.statuses, status):
	default:
		return false
	}
	return true
}

// BackOff before the n-th retry, counted from 1; pick returns a number below its argument.
func (r *Retry) BackOff(n int, pick func(uint64) uint64) time.Duration {
	limit := r.max
	if n < 32 && r.base<<(n-1) < r.max && r.base<<(n-1) > 0 {
		limit = r.base << (n - 1)
	}
	return time.Duration(pick(uint64(limit) + 1))
}
