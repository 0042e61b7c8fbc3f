// SPDX-License-Identifier: Apache-2.0

package cni_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
	"github.com/weirmesh/weir/services/agent/internal/address"
	"github.com/weirmesh/weir/services/agent/internal/cni"
	"github.com/weirmesh/weir/services/agent/internal/endpoint"
	"github.com/weirmesh/weir/services/agent/internal/netdev"
)

type fake struct{ err error }

func (f fake) Add(_ context.Context, r endpoint.AddRequest) (*endpoint.Added, error) {
	if f.err != nil {
		return nil, f.err
	}
	return &endpoint.Added{Endpoint: endpoint.Endpoint{MAC: "m", HostIfName: "wr0123456789", HostMAC: "h", MTU: 1500,
		Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.5"), netip.MustParseAddr("fd00::5")}}, LateNodes: []string{r.Name}}, nil
}
func (f fake) Delete(context.Context, string, string) error                { return f.err }
func (f fake) Check(string, string, string) error                          { return f.err }
func (f fake) CollectGarbage(context.Context, []endpoint.Attachment) error { return f.err }

func request(change func(*agentv1.AddRequest)) *agentv1.AddRequest {
	r := &agentv1.AddRequest{ContainerId: "abc-1", Netns: "/run/netns/a", Ifname: "eth0", PodNamespace: "default", PodName: "web-1"}
	change(r)
	return r
}

func TestAdd(t *testing.T) {
	s := cni.New(fake{}, func() error { return nil })
	r, err := s.Add(t.Context(), request(func(*agentv1.AddRequest) {}))
	if err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(r.Addresses, r.Gateways, r.LateNodes) != "[10.0.0.5/32 fd00::5/128] [169.254.1.1 fe80::1] [web-1]" {
		t.Errorf("response %v", r)
	}
}

func TestAddNamesTheFaultyField(t *testing.T) {
	tests := []struct {
		field  string
		change func(*agentv1.AddRequest)
	}{
		{"container_id", func(r *agentv1.AddRequest) { r.ContainerId = "" }},
		{"container_id", func(r *agentv1.AddRequest) { r.ContainerId = "../x" }},
		{"ifname", func(r *agentv1.AddRequest) { r.Ifname = "" }},
		{"ifname", func(r *agentv1.AddRequest) { r.Ifname = "a/b" }},
		{"ifname", func(r *agentv1.AddRequest) { r.Ifname = strings.Repeat("x", 16) }},
		{"ifname", func(r *agentv1.AddRequest) { r.Ifname = ".." }},
		{"netns", func(r *agentv1.AddRequest) { r.Netns = "relative" }},
		{"pod_namespace", func(r *agentv1.AddRequest) { r.PodNamespace = "Upper" }},
		{"pod_name", func(r *agentv1.AddRequest) { r.PodName = "" }},
	}
	s := cni.New(fake{}, func() error { return nil })
	for _, tt := range tests {
		_, err := s.Add(t.Context(), request(tt.change))
		if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), tt.field) {
			t.Errorf("%s: %v", tt.field, err)
		}
	}
}

func TestCodes(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want codes.Code
	}{
		{endpoint.ErrNoPolicy, codes.DeadlineExceeded}, {address.ErrExhausted, codes.ResourceExhausted}, {address.ErrTaken, codes.ResourceExhausted},
		{address.ErrOutside, codes.InvalidArgument}, {netdev.ErrNoNamespace, codes.InvalidArgument}, {endpoint.ErrBusy, codes.Aborted},
		{context.Canceled, codes.Canceled}, {errors.New("map is full"), codes.Internal},
	} {
		s := cni.New(fake{fmt.Errorf("wrapped: %w", tt.err)}, func() error { return nil })
		if _, err := s.Add(t.Context(), request(func(*agentv1.AddRequest) {})); status.Code(err) != tt.want {
			t.Errorf("%v: code %s, want %s", tt.err, status.Code(err), tt.want)
		}
	}
}

func TestOtherCalls(t *testing.T) {
	ok := cni.New(fake{}, func() error { return nil })
	bad := cni.New(fake{endpoint.ErrUnknown}, func() error { return errors.New("no state") })
	if _, err := ok.Delete(t.Context(), &agentv1.DeleteRequest{ContainerId: "a", Ifname: "eth0"}); err != nil {
		t.Errorf("delete: %v", err)
	}
	if _, err := ok.Delete(t.Context(), &agentv1.DeleteRequest{}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("delete without a container: %v", err)
	}
	if _, err := bad.Check(t.Context(), &agentv1.CheckRequest{ContainerId: "a", Ifname: "eth0"}); status.Code(err) != codes.NotFound {
		t.Errorf("check of nothing: %v", err)
	}
	differs := cni.New(fake{errors.New("address is missing")}, nil)
	if _, err := differs.Check(t.Context(), &agentv1.CheckRequest{ContainerId: "a", Ifname: "eth0"}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("check that finds a difference: %v", err)
	}
	if _, err := ok.Ready(t.Context(), &agentv1.ReadyRequest{}); err != nil {
		t.Errorf("ready: %v", err)
	}
	if _, err := bad.Ready(t.Context(), &agentv1.ReadyRequest{}); status.Code(err) != codes.Unavailable {
		t.Errorf("not ready: %v", err)
	}
	gc := &agentv1.CollectGarbageRequest{Valid: []*agentv1.Attachment{{ContainerId: "a", Ifname: "eth0"}, {Ifname: "eth0"}}}
	if _, err := ok.CollectGarbage(t.Context(), gc); status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "valid[1]") {
		t.Errorf("garbage: %v", err)
	}
}
