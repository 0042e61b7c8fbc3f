// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	"github.com/weirmesh/weir/services/agent/internal/testns"
)

// Sizes of the benchmark of many services; perUpdate is what the policy service puts into one update.
const (
	manyServices = 10_000
	manyBackends = 10 // of each, and nobody else's
	perUpdate    = 500
)

func crowdedService(i, port int) *policyv1.Resource {
	s := &policyv1.Service{Namespace: "default", Name: fmt.Sprint("s", i), Type: "ClusterIP", ClusterIps: []string{fmt.Sprintf("10.96.%d.%d", i>>8, i&255)}}
	p := &policyv1.ServicePort{Protocol: policyv1.Protocol_PROTOCOL_TCP, Port: 80}
	for j := range manyBackends {
		n := i*manyBackends + j
		p.Backends = append(p.Backends, &policyv1.Backend{Address: fmt.Sprintf("10.%d.%d.%d", 128+n>>16, n>>8&255, n&255), Port: uint32(port), Node: fmt.Sprint("node-", 2+n%100)})
	}
	s.Ports = []*policyv1.ServicePort{p}
	return &policyv1.Resource{Resource: &policyv1.Resource_Service{Service: s}}
}

// BenchmarkManyServices sends an agent 10,000 services with 100,000 backends over the wire, and then single changes; the time ends when it has acknowledged them,
// so when they are in the kernel's maps.
func BenchmarkManyServices(b *testing.B) {
	b.Run("all", func(b *testing.B) {
		var took, used time.Duration
		for b.Loop() {
			testns.Do(b, func() {
				c := newCluster(b)
				c.start()
				defer c.kill()
				empty := processMiB(b, c.agent.Process.Pid)
				cpu, start := processCPU(b, c.agent.Process.Pid), time.Now()
				c.pushServices(b)
				took += time.Since(start)
				used += processCPU(b, c.agent.Process.Pid) - cpu
				b.ReportMetric(empty, "empty-MiB")
				b.ReportMetric(processMiB(b, c.agent.Process.Pid), "MiB")
			})
		}
		b.ReportMetric(took.Seconds()*1000/float64(b.N), "ms")
		b.ReportMetric(used.Seconds()*1000/float64(b.N), "cpu-ms")
		b.ReportMetric(0, "ns/op")
	})
	b.Run("one more change", func(b *testing.B) {
		testns.Do(b, func() {
			c := newCluster(b)
			c.start()
			defer c.kill()
			c.pushServices(b)
			for i := 0; b.Loop(); i++ {
				c.central.push(b, crowdedService(i%manyServices, 9000+i/manyServices))
			}
		})
	})
}

// pushServices sends them without waiting between updates.
func (c *cluster) pushServices(b *testing.B) {
	b.Helper()
	var updates []*policyv1.Update
	c.central.mu.Lock()
	for i := range manyServices {
		if i%perUpdate == 0 {
			c.central.revision++
			updates = append(updates, &policyv1.Update{Revision: c.central.revision + 2})
		}
		u := updates[len(updates)-1]
		u.Upserts = append(u.Upserts, crowdedService(i, 8080))
	}
	c.central.mu.Unlock()
	patience := time.After(time.Minute)
	for _, u := range updates {
		select {
		case c.central.updates <- u:
		case <-patience:
			b.Fatal("the agent takes no update")
		}
	}
	for last := updates[len(updates)-1].Revision; ; {
		select {
		case ack := <-c.central.acks:
			if ack >= last {
				return
			}
		case <-patience:
			b.Fatalf("revision %d was not acknowledged", last)
		}
	}
}

// processCPU is the user and system time of a process so far.
func processCPU(b *testing.B, pid int) time.Duration {
	b.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		b.Fatal(err)
	}
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+2:]))
	user, err1 := strconv.Atoi(fields[11])
	system, err2 := strconv.Atoi(fields[12])
	if err1 != nil || err2 != nil {
		b.Fatalf("/proc/%d/stat: %s", pid, data)
	}
	return time.Duration(user+system) * 10 * time.Millisecond // USER_HZ is 100
}

// processMiB is the resident memory of a process.
func processMiB(b *testing.B, pid int) float64 {
	b.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		b.Fatal(err)
	}
	pages, err := strconv.Atoi(strings.Fields(string(data))[1])
	if err != nil {
		b.Fatal(err)
	}
	return float64(pages*os.Getpagesize()) / (1 << 20)
}
