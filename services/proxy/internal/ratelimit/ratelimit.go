// SPDX-License-Identifier: Apache-2.0

// Package ratelimit is the token bucket of Envoy's local rate limit filter.
package ratelimit

import (
	"errors"
	"fmt"
	"math"
	"net/http"
	"sync"
	"time"

	ratelimitv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/local_ratelimit/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"

	"github.com/weirmesh/weir/services/proxy/internal/fields"
	"github.com/weirmesh/weir/services/proxy/internal/mutation"
)

// Limit is a compiled configuration with its bucket. Safe for concurrent use.
type Limit struct {
	// Status of refusals, Response their headers.
	Status   int
	Response mutation.List
	// enabled, enforced: shares of requests, in parts of a million.
	enabled, enforced uint64
	bucket            *bucket
}

type bucket struct {
	max, fill uint64
	interval  time.Duration

	mu     sync.Mutex
	tokens uint64
	filled time.Time
}

// Compile compiles a configuration; now starts its bucket full.
func Compile(c *ratelimitv3.LocalRateLimit, path string, now time.Time) (*Limit, error) {
	if err := fields.Only(c, path, "stat_prefix", "status", "token_bucket", "filter_enabled", "filter_enforced", "response_headers_to_add"); err != nil {
		return nil, err
	}
	l := &Limit{Status: int(c.GetStatus().GetCode())}
	if l.Status < http.StatusBadRequest {
		l.Status = http.StatusTooManyRequests
	}
	var err, errs error
	if l.Response, err = mutation.Compile(c.GetResponseHeadersToAdd(), nil, path, "response_"); err != nil {
		errs = errors.Join(errs, err)
	}
	if l.enabled, err = share(c.GetFilterEnabled().GetDefaultValue()); err != nil {
		errs = errors.Join(errs, fmt.Errorf("%s: %w", fields.Join(path, "filter_enabled"), err))
	}
	if l.enforced, err = share(c.GetFilterEnforced().GetDefaultValue()); err != nil {
		errs = errors.Join(errs, fmt.Errorf("%s: %w", fields.Join(path, "filter_enforced"), err))
	}
	if b := c.GetTokenBucket(); b != nil {
		l.bucket = &bucket{max: uint64(b.GetMaxTokens()), fill: 1, interval: b.GetFillInterval().AsDuration(), tokens: uint64(b.GetMaxTokens()), filled: now}
		if b.GetTokensPerFill() != nil {
			l.bucket.fill = uint64(b.GetTokensPerFill().GetValue())
		}
		if l.bucket.interval <= 0 || l.bucket.max == 0 || l.bucket.fill == 0 {
			errs = errors.Join(errs, fmt.Errorf("%s: nothing is ever let through", fields.Join(path, "token_bucket")))
		}
	}
	return l, errs
}

const million = 1_000_000

func share(p *typev3.FractionalPercent) (uint64, error) {
	scale := map[typev3.FractionalPercent_DenominatorType]uint64{
		typev3.FractionalPercent_HUNDRED: million / 100, typev3.FractionalPercent_TEN_THOUSAND: million / 10_000, typev3.FractionalPercent_MILLION: 1,
	}[p.GetDenominator()]
	if scale == 0 {
		return 0, errors.New("denominator")
	}
	return uint64(p.GetNumerator()) * scale, nil
}

// Allow takes a token; false = refuse. pick returns a number below its argument.
func (l *Limit) Allow(now time.Time, pick func(uint64) uint64) bool {
	if l.bucket == nil || !in(l.enabled, pick) || l.bucket.take(now) {
		return true
	}
	return !in(l.enforced, pick)
}

func in(share uint64, pick func(uint64) uint64) bool {
	return share >= million || share > 0 && pick(million) < share
}

func (b *bucket) take(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if n := now.Sub(b.filled) / b.interval; n > 0 {
		b.filled = b.filled.Add(n * b.interval)
		if uint64(n) > math.MaxUint32 {
			n = math.MaxUint32
		}
		b.tokens = min(b.max, b.tokens+uint64(n)*b.fill)
	}
	if b.tokens == 0 {
		return false
	}
	b.tokens--
	return true
}
