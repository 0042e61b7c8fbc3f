// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"
	"google.golang.org/grpc"

	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
	statusv1 "github.com/weirmesh/weir/gen/weir/status/v1"
	"github.com/weirmesh/weir/internal/flags"
	"github.com/weirmesh/weir/services/agent"
	"github.com/weirmesh/weir/services/agent/internal/testns"
)

// asAgent makes this test binary run as an agent, so that a test can kill one.
const asAgent = "WEIR_AGENT_TEST_PROCESS"

func TestMain(m *testing.M) {
	if os.Getenv(asAgent) == "" {
		os.Exit(m.Run())
	}
	config := agent.DefaultConfig()
	set := pflag.NewFlagSet("agent", pflag.ContinueOnError)
	config.Add(set)
	err := flags.Parse(set, os.Args[1:], os.LookupEnv)
	if err == nil {
		log, _ := flags.Logger(os.Stderr, "warn")
		var s *agent.Service
		if s, err = agent.New(config, log); err == nil {
			err = s.Run(context.Background())
		}
	}
	fmt.Fprintln(os.Stderr, "agent ended:", err)
	os.Exit(1)
}

// An agent is killed while traffic flows and the relay is away. Traffic goes on; every record of the kernel arrives, or its number or ring is
// reported.
func TestKilledUnderLoad(t *testing.T) {
	testns.Do(t, func() {
		c := newCluster(t)
		c.start()
		c.plug("a")
		c.plug("b")
		c.send(500)
		c.central.until(t, "first flows", func(a account) bool { return a.named["a>b"] >= 1000 }) // two observation points
		c.central.setAway(true)
		c.send(2000)
		c.kill()
		c.send(2000) // nobody reads: the rings hold it
		c.central.setAway(false)
		c.start()
		c.send(500)
		written, lost, created := c.counters()
		if lost != 0 || created < 10000 {
			t.Errorf("%d records lost, %d connections: want none and at least 2 x 5000", lost, created)
		}
		a := c.central.until(t, "all records", func(a account) bool {
			var missing uint64
			for epoch, last := range a.restarts {
				missing += last - a.epochs[epoch]
			}
			return a.started == 2 && a.flows+missing >= written
		})
		if len(a.restarts) != 1 || len(a.epochs) != 2 {
			t.Errorf("account %+v: want two epochs, and a report of the first one's end", a)
		}
		for epoch, last := range a.restarts {
			if a.high[epoch] > last {
				t.Errorf("number %d of epoch %d arrived, its end was reported as %d", a.high[epoch], epoch, last)
			}
		}
		if a.named[">"] > 0 {
			t.Errorf("flows without names: %v", a.named)
		}
		c.kill()
	})
}

// Rings of a page lose most of what nobody reads. Every loss is told once, also when the agent that told it was killed.
func TestLossesOfSmallRings(t *testing.T) {
	testns.Do(t, func() {
		c := newCluster(t, "--ring-bytes=8192", "--aggregation=none")
		c.start()
		c.plug("a")
		c.plug("b")
		for range 3 {
			c.send(3000)
			_, lost, _ := c.counters()
			c.central.until(t, "losses", func(a account) bool { return a.kernelLost >= lost })
			c.kill()
			c.send(3000)
			c.start()
		}
		var written, lost uint64
		a := c.central.until(t, "all losses", func(a account) bool {
			written, lost, _ = c.counters()
			return a.kernelLost >= lost && a.flows >= written
		})
		if lost == 0 || a.kernelLost != lost || a.flows != written {
			t.Errorf("%d flows of %d records, %d told as lost of %d", a.flows, written, a.kernelLost, lost)
		}
		c.kill()
	})
}

func drain[T any](t *testing.T, stream grpc.ServerStreamingClient[T], err error) []*T {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	var all []*T
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, m)
	}
}

// What the command line shows of a node, from a running agent.
func TestAgentShowsItsNode(t *testing.T) {
	testns.Do(t, func() {
		c := newCluster(t)
		c.start()
		defer c.kill()
		c.plug("a")
		c.plug("b")
		conn := c.dial()
		defer conn.Close()
		client := agentv1.NewAgentServiceClient(conn)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()

		watch, err := client.Monitor(ctx, &agentv1.MonitorRequest{})
		if err != nil {
			t.Fatal(err)
		}
		// The watching has begun when a record of this traffic comes.
		var seen *agentv1.MonitorResponse
		got := make(chan *agentv1.MonitorResponse, 1)
		go func() {
			m, err := watch.Recv()
			if err == nil {
				got <- m
			}
		}()
		for seen == nil && ctx.Err() == nil {
			c.send(10)
			select {
			case seen = <-got:
			case <-time.After(50 * time.Millisecond):
			}
		}
		if seen == nil || !strings.Contains(seen.Text, "udp") || seen.Time.AsTime().IsZero() {
			t.Errorf("monitor showed %v", seen)
		}

		endpoints, err := client.ListEndpoints(ctx, &agentv1.ListEndpointsRequest{})
		if err != nil {
			t.Fatal(err)
		}
		var pods []string
		for _, e := range endpoints.Endpoints {
			if e.PodName != "" && e.State == "ready" && e.Identity == 300 && fmt.Sprint(e.Labels) == "[k8s:app=test]" && strings.HasPrefix(e.Interface, "wr") {
				pods = append(pods, e.PodName)
			}
		}
		slices.Sort(pods)
		if !slices.Equal(pods, []string{"a", "b"}) {
			t.Errorf("endpoints %v", endpoints)
		}
		identities, err := client.ListIdentities(ctx, &agentv1.ListIdentitiesRequest{})
		if err != nil || !slices.ContainsFunc(identities.Identities, func(i *agentv1.IdentityEntry) bool { return i.Number == 300 }) ||
			!slices.ContainsFunc(identities.Identities, func(i *agentv1.IdentityEntry) bool { return i.Number == 1 }) {
			t.Errorf("identities %v, %v", identities, err)
		}
		ct, err := client.DumpConntrack(ctx, &agentv1.DumpConntrackRequest{})
		directions := map[string]int{}
		for _, e := range drain(t, ct, err) {
			if e.Protocol == "UDP" && strings.HasPrefix(e.Source, c.address["a"]+":") && e.ForwardPackets > 0 && e.PeerIdentity == 300 {
				directions[e.Direction]++
			}
		}
		if directions["egress"] < 10 || directions["egress"] != directions["ingress"] {
			t.Errorf("connections by direction %v, want as many ingress as egress, at least 10", directions)
		}
		cache, err := client.DumpIPCache(ctx, &agentv1.DumpIPCacheRequest{})
		rows := map[string]uint32{}
		for _, r := range drain(t, cache, err) {
			rows[r.Prefix] = r.Identity
		}
		for prefix, want := range map[string]uint32{c.address["a"] + "/32": 300, "172.30.0.11/32": 1, "10.244.1.0/24": 3} {
			if rows[prefix] != want {
				t.Errorf("ipcache: %s is %d, want %d", prefix, rows[prefix], want)
			}
		}
		services, err := client.DumpServices(ctx, &agentv1.DumpServicesRequest{})
		if rows := drain(t, services, err); len(rows) != 0 {
			t.Errorf("services %v", rows)
		}
		if list, err := client.ListServices(ctx, &agentv1.ListServicesRequest{}); err != nil || len(list.Services) != 0 {
			t.Errorf("services %v, %v", list, err)
		}
		st, err := statusv1.NewStatusServiceClient(conn).GetStatus(ctx, &statusv1.GetStatusRequest{})
		if err != nil || !st.Ready || st.Part != "agent" || st.Instance != "node-1" ||
			!slices.ContainsFunc(st.Details, func(d *statusv1.Detail) bool { return d.Name == "endpoints" && d.Value == "2" }) {
			t.Errorf("status %v, %v", st, err)
		}

		del := agentv1.NewCNIServiceClient(conn)
		for _, name := range []string{"a", "b"} {
			if _, err := del.Delete(ctx, &agentv1.DeleteRequest{ContainerId: "c-" + name, Ifname: "eth0"}); err != nil {
				t.Error(err)
			}
		}
		ct, err = client.DumpConntrack(ctx, &agentv1.DumpConntrackRequest{})
		if left := drain(t, ct, err); len(left) != 0 {
			t.Errorf("%d connections of pods that are gone", len(left))
		}
	})
}
