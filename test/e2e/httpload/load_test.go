// SPDX-License-Identifier: Apache-2.0

package httpload

import (
	"context"
	"testing"
	"time"
)

// TestLoad: the load and the origin agree on what a request is, and a rate is kept.
func TestLoad(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	const address = "127.0.0.1:19990"
	ended := make(chan error, 1)
	go func() { ended <- ServeOrigin(ctx, address) }()
	r, err := Load(ctx, address, 4, 0, 200*time.Millisecond, "/")
	if err != nil || r.Requests < 10 {
		t.Fatalf("as fast as may be: %d requests, %d failed, %v", r.Requests, r.Failed, err)
	}
	r, err = Load(ctx, address, 4, 100, time.Second, "/")
	if err != nil || r.Failed > 0 || r.Requests > 110 || r.Latency(0.99) < r.Latency(0.5) {
		t.Errorf("100 a second: %d requests, %d failed, %v, %s, %s", r.Requests, r.Failed, err, r.Latency(0.5), r.Latency(0.99))
	}
	closeAll, err := Idle(ctx, address, 20)
	closeAll()
	if err != nil {
		t.Error(err)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
