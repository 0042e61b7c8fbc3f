// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// Program runs come at the loopback interface unless told otherwise, and the timed kind cannot be told.
const loopback = 1

// benchRuns is how often the kernel runs a program per measurement: few enough that the records of all runs fit the rings.
const benchRuns = 100000

func benchWorld(b *testing.B, change func(*Config)) *bench {
	w := newBench(b, func(c *Config) {
		c.RingBytes = 128 << 20
		if change != nil {
			change(c)
		}
	})
	for _, ep := range []EndpointRow{
		{podA4, Endpoint{ID: epA, Identity: idA, IfIndex: loopback}}, {podA6, Endpoint{ID: epA, Identity: idA, IfIndex: loopback}},
	} {
		if err := w.Endpoints().Upsert(ep.Addr, ep.Endpoint); err != nil {
			b.Fatal(err)
		}
	}
	return w
}

// measure reports the nanoseconds of one run of a program.
func measure(b *testing.B, w *bench, prog *ebpf.Program, packet []byte) {
	var total time.Duration
	for b.Loop() {
		var took time.Duration
		err := inside(w.ns, func() (err error) {
			_, took, err = prog.Benchmark(packet, benchRuns, nil)
			return err
		})
		if err != nil {
			b.Fatal(err)
		}
		total += took
		b.StopTimer()
		w.records()
		b.StartTimer()
	}
	b.ReportMetric(float64(total.Nanoseconds())/float64(b.N), "ns/packet")
	b.ReportMetric(0, "ns/op")
	if c := w.counters(); c.Lost.Total() != 0 {
		b.Errorf("%d records lost: the rings are too small for this measurement", c.Lost.Total())
	}
}

// The cost of a packet, beside that of a program that does nothing. One record: the same with a record, at one observation point or two.
func BenchmarkPacket(b *testing.B) {
	b.Run("empty program", func(b *testing.B) {
		w := benchWorld(b, nil)
		empty, err := ebpf.NewProgram(&ebpf.ProgramSpec{
			Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
		})
		if err != nil {
			b.Fatal(err)
		}
		defer empty.Close()
		measure(b, w, empty, tcp(b, at(podA4, 1), at(far4, 2), ack, 1, 1, 100))
	})
	for _, c := range []struct {
		name    string
		program string
		every   Aggregation
		packet  func(testing.TB) []byte
	}{
		{"pod to network v4", tcProgFromPod, AggregationMedium, func(t testing.TB) []byte { return tcp(t, at(podA4, 1), at(far4, 2), ack, 1, 1, 100) }},
		{"pod to network v6", tcProgFromPod, AggregationMedium, func(t testing.TB) []byte { return tcp(t, at(podA6, 1), at(far6, 2), ack, 1, 1, 100) }},
		{"pod to network udp", tcProgFromPod, AggregationMedium, func(t testing.TB) []byte { return udp(t, at(podA4, 1), at(far4, 2), 100) }},
		{"network to pod v4", tcProgFromNetwork, AggregationMedium, func(t testing.TB) []byte { return tcp(t, at(far4, 2), at(podA4, 1), ack, 1, 1, 100) }},
		{"pod to local pod v4", tcProgFromPod, AggregationMedium, func(t testing.TB) []byte { return tcp(t, at(podA4, 1), at(podB4, 2), ack, 1, 1, 100) }},
		{"pod to network, one record", tcProgFromPod, AggregationNone, func(t testing.TB) []byte { return tcp(t, at(podA4, 1), at(far4, 2), ack, 1, 1, 100) }},
		{"pod to local pod, two records", tcProgFromPod, AggregationNone, func(t testing.TB) []byte { return tcp(t, at(podA4, 1), at(podB4, 2), ack, 1, 1, 100) }},
		{"spoofed, a drop record", tcProgFromPod, AggregationMedium, func(t testing.TB) []byte { return udp(t, at(podB4, 1), at(far4, 2), 100) }},
	} {
		b.Run(c.name, func(b *testing.B) {
			w := benchWorld(b, func(cfg *Config) { cfg.Aggregation = c.every })
			measure(b, w, w.coll.Programs[c.program], c.packet(b))
		})
	}
	b.Run("uplink, not masqueraded", func(b *testing.B) {
		w := benchWorld(b, func(c *Config) { c.Masquerade, c.NodeIPv4 = true, node4 })
		measure(b, w, w.coll.Programs[tcProgToNetwork], tcp(b, at(podA4, 1), at(out4, 2), ack, 1, 1, 100))
	})
}

// The cost of deciding, by the number of rows of the policy, and of ports in the row. The packet is an ICMP error about nothing, which is decided
// each time and makes no record; the first line is the same packet where nothing is enforced. After these, a packet of a live connection, which is
// not decided.
func BenchmarkPolicy(b *testing.B) {
	message := func(t testing.TB) []byte {
		return rawIP(t, far4, podA4, unix.IPPROTO_ICMP, append([]byte{5, 0, 0, 0, 0, 0, 0, 0}, make([]byte, 40)...), nil)
	}
	segment := func(t testing.TB) []byte { return tcp(t, at(far4, 2), at(podA4, 1), ack, 1, 1, 100) }
	for _, c := range []struct {
		name        string
		packet      func(testing.TB) []byte
		rows, ports int
	}{
		{"decided, not enforced", message, 0, 0},
		{"decided, empty policy", message, 1, 0},
		{"decided, 10 rows", message, 10, 1},
		{"decided, 1000 rows", message, 1000, 1},
		{"decided, 60000 rows", message, 60000, 1},
		{"decided, 60000 rows, 1000 ports", message, 60000, 1000},
		{"live, not enforced", segment, 0, 0},
		{"live, 60000 rows", segment, 60000, 1},
	} {
		b.Run(c.name, func(b *testing.B) {
			w := benchWorld(b, nil)
			for i := range c.rows {
				peer := uint32(0)
				ranges := []PolicyRange{everything[0]}
				if i > 0 {
					peer = idFar + uint32(i) - 1
					for port := range c.ports {
						ranges = append(ranges, allowPort(unix.IPPROTO_UDP, uint16(1+2*port), uint32(port)))
					}
				}
				if err := w.Policies().SetPeer(5, peer, ranges); err != nil {
					b.Fatal(err)
				}
			}
			if c.rows > 0 {
				if err := w.Policies().SetEndpoint(epA, EndpointPolicy{Ingress: 5}); err != nil {
					b.Fatal(err)
				}
			}
			measure(b, w, w.coll.Programs[tcProgFromNetwork], c.packet(b))
		})
	}
}

// What the verifier counted for each program.
func BenchmarkInstructions(b *testing.B) {
	w := benchWorld(b, func(c *Config) { c.Masquerade, c.NodeIPv4, c.NodeIPv6 = true, node4, node6 })
	for _, coll := range []*ebpf.Collection{w.coll, w.sock} {
		for name, p := range coll.Programs {
			b.Run(name, func(b *testing.B) {
				info, err := p.Info()
				if err != nil {
					b.Fatal(err)
				}
				n, ok := info.VerifiedInstructions()
				if !ok {
					b.Fatal("the kernel does not tell")
				}
				for b.Loop() {
				}
				b.ReportMetric(float64(n), "insns")
				b.ReportMetric(0, "ns/op")
			})
		}
	}
}

// The cost of reading a record, as the agent does it: drained, merged by time, committed.
func BenchmarkRead(b *testing.B) {
	w := benchWorld(b, nil)
	packet := udp(b, at(podB4, 1), at(far4, 2), 100)
	var records, total int
	var took time.Duration
	for b.Loop() {
		b.StopTimer()
		err := inside(w.ns, func() error {
			_, _, err := w.coll.Programs[tcProgFromPod].Benchmark(packet, benchRuns, nil)
			return err
		})
		if err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
		start := time.Now()
		records = w.Rings().Drain(1<<30, func(int, *Record, uint64) {})
		if err := w.Rings().Commit(w.Rings().Positions()); err != nil {
			b.Fatal(err)
		}
		took += time.Since(start)
		total += records
	}
	b.ReportMetric(float64(took.Nanoseconds())/float64(total), "ns/record")
	b.ReportMetric(0, "ns/op")
}
