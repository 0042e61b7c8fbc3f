// SPDX-License-Identifier: Apache-2.0

package httpproxy

import (
	"context"
	"errors"
	"net/http"
	"time"

	"golang.org/x/net/http2"

	"github.com/weirmesh/weir/services/proxy/internal/model"
	"github.com/weirmesh/weir/services/proxy/internal/route"
	"github.com/weirmesh/weir/services/proxy/internal/strict"
	"github.com/weirmesh/weir/services/proxy/internal/upstream"
)

var errPerTry = errors.New("timeout of an attempt")

// failure is an attempt without an answer: how it counts for retries, and what the client is told.
type failure struct {
	kind                route.Failure
	status              int
	flag, body, details string
}

const resetReason = "upstream connect error or disconnect/reset before headers. reset reason: "

// classify says what an attempt's error means.
func (w *forwarding) classify(err error, unsent bool) *failure {
	var connect *upstream.ConnectError
	var stream http2.StreamError
	var goAway http2.GoAwayError //nolint:staticcheck // what the transport of package upstream returns
	switch {
	case errors.Is(err, errPerTry):
		return &failure{route.PerTryTimeout, http.StatusGatewayTimeout, "UT", errTimeout.Error(), "upstream_per_try_timeout"}
	case errors.Is(err, errTimeout):
		return &failure{0, http.StatusGatewayTimeout, "UT", errTimeout.Error(), "upstream_response_timeout"}
	case errors.Is(err, errIdle):
		return &failure{0, http.StatusRequestTimeout, "SI", errIdle.Error(), "stream_idle_timeout"}
	case errors.Is(err, errRequest):
		return &failure{0, http.StatusRequestTimeout, "", errRequest.Error(), "request_overall_timeout"}
	case errors.Is(err, errMaxStream):
		return &failure{0, http.StatusGatewayTimeout, "UMSDR", errTimeout.Error(), "max_duration_timeout"}
	case w.x.body.failed() != nil:
		return bodyFailure(w.x.body.failed())
	case w.x.r.Context().Err() != nil || errors.Is(err, context.Canceled):
		return &failure{flag: "DC", details: "downstream_remote_disconnect"}
	case errors.Is(err, model.ErrNoEndpoint):
		return &failure{0, http.StatusServiceUnavailable, "UH", "no healthy upstream", "no_healthy_upstream"}
	case errors.Is(err, model.ErrOverflow):
		return &failure{0, http.StatusServiceUnavailable, "UO", resetReason + "overflow", "upstream_reset_before_response_started{overflow}"}
	case errors.As(err, &connect):
		return &failure{route.Connect, http.StatusServiceUnavailable, "UF", resetReason + "connection failure",
			"upstream_reset_before_response_started{connection_failure}"}
	case errors.As(err, &stream) && stream.Code == http2.ErrCodeRefusedStream || errors.As(err, &goAway):
		return &failure{route.Refused, http.StatusServiceUnavailable, "UR", resetReason + "remote refused stream reset",
			"upstream_reset_before_response_started{remote_refused_stream_reset}"}
	}
	kind := route.Reset
	if unsent {
		kind = route.Unsent
	}
	return &failure{kind, http.StatusServiceUnavailable, "UC", resetReason + "connection termination",
		"upstream_reset_before_response_started{connection_termination}"}
}

// bodyFailure is the client's fault: a body that is malformed, or that did not come to its end.
func bodyFailure(err error) *failure {
	var bad *strict.Error
	if errors.As(err, &bad) {
		return &failure{0, bad.Status, "DPE", http.StatusText(bad.Status), "http1." + bad.Cause}
	}
	return &failure{flag: "DC", details: "downstream_remote_disconnect"}
}

// late reports whether the client's own deadline has come: a server that resets a stream then says what the client is about to say.
func (w *forwarding) late() bool {
	d, ok := grpcTimeout(w.x.q.Header.Get("Grpc-Timeout"))
	// The server's clock began later, but from a value that was rounded.
	return ok && time.Since(w.x.entry.Start) >= d*9/10
}

// refuse answers a request that got no answer.
func (w *forwarding) refuse(f *failure, wanted bool) {
	x := w.x
	if wanted && w.retries > 0 && w.retries >= w.f.Retry.Num && f.status != 0 {
		x.flag("URX")
	}
	if f.flag == "DPE" || f.flag == "SI" || f.flag == "DC" {
		x.close = true
	}
	if f.status == 0 {
		x.flag(f.flag)
		x.entry.Details = f.details
		panic(http.ErrAbortHandler)
	}
	if f.kind == route.Reset && w.late() {
		x.grpcStatus = grpcDeadlineExceeded
	}
	x.reply(f.status, f.body, f.flag, f.details)
}
