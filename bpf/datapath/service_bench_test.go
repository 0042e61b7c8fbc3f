// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"fmt"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// manyServices is n services with their backends, each other ones.
func manyServices(n, each int, algorithm Algorithm) []Service {
	var list []Service
	for i := range n {
		svc := Service{
			Frontend: Frontend{netip.AddrFrom4([4]byte{10, 96 + byte(i>>16), byte(i >> 8), byte(i)}), 80, 6}, ID: uint32(i + 1), Algorithm: algorithm,
		}
		for j := range each {
			k := i*each + j
			svc.Backends = append(svc.Backends, Backend{AddrPort: at(netip.AddrFrom4([4]byte{10, 128 + byte(k>>16), byte(k >> 8), byte(k)}), 8080), Local: j == 0})
		}
		list = append(list, svc)
	}
	return list
}

func processTime(b *testing.B) time.Duration {
	b.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// mapBytes is the memory that the kernel says maps have.
func mapBytes(b *testing.B, maps ...*ebpf.Map) (total uint64) {
	b.Helper()
	for _, m := range maps {
		info, err := m.Info()
		if err != nil {
			b.Fatal(err)
		}
		n, ok := info.Memlock()
		if !ok {
			b.Fatal("the kernel does not tell the memory of a map")
		}
		total += n
	}
	return total
}

// 10,000 services with 100,000 backends: time of the first load, of an unchanged one, of a change of one in ten, and of a restart; memory of the
// maps and of the owner.
func BenchmarkServicesLoad(b *testing.B) {
	for name, algorithm := range map[string]Algorithm{"random": Random, "maglev": Maglev} {
		b.Run(name, func(b *testing.B) {
			const n, each = 10000, 10
			var cpu, first, same, changed, restart time.Duration
			var heap, kernel uint64
			for b.Loop() {
				cfg := DefaultConfig()
				cfg.PinPath = bpffs(b)
				d := load(b, cfg)
				m := d.Services().maps
				all := []*ebpf.Map{m.services, m.backends, m.members, m.maglev}
				list := manyServices(n, each, algorithm)
				var before, after runtime.MemStats
				runtime.GC()
				runtime.ReadMemStats(&before)
				empty := mapBytes(b, all...)
				upsert := func(list []Service) time.Duration {
					start := time.Now()
					if err := d.Services().Upsert(list...); err != nil {
						b.Fatal(err)
					}
					return time.Since(start)
				}
				began := processTime(b)
				first += upsert(list)
				cpu += processTime(b) - began
				kernel += mapBytes(b, all...) - empty
				same += upsert(list)
				for i := 0; i < n; i += 10 {
					list[i].Backends = list[i].Backends[1:]
				}
				changed += upsert(list)
				runtime.GC()
				runtime.ReadMemStats(&after)
				heap += after.HeapAlloc - before.HeapAlloc
				start := time.Now()
				if _, err := newServices(m); err != nil {
					b.Fatal(err)
				}
				restart += time.Since(start)
			}
			b.ReportMetric(0, "ns/op")
			for what, t := range map[string]time.Duration{"first-cpu": cpu, "first": first, "same": same, "changed": changed, "restart": restart} {
				b.ReportMetric(float64(t.Milliseconds())/float64(b.N), what+"-ms")
			}
			b.ReportMetric(float64(heap)/float64(b.N)/(1<<20), "heap-MiB")
			b.ReportMetric(float64(kernel)/float64(b.N)/(1<<20), "maps-MiB")
		})
	}
}

// measureFresh reports the nanoseconds of one run on a fresh packet each time: a program that changes the packet would else be measured on what
// it has made. The kernel's clock around one run is in it, about as much as for the empty program.
func measureFresh(b *testing.B, w *bench, prog *ebpf.Program, packet []byte) {
	const runs = 20000
	var total time.Duration
	for b.Loop() {
		err := inside(w.ns, func() error {
			for range runs {
				_, took, err := prog.Benchmark(packet, 1, nil)
				if err != nil {
					return err
				}
				total += took
			}
			return nil
		})
		if err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		w.records()
		b.StartTimer()
	}
	b.ReportMetric(float64(total.Nanoseconds())/float64(b.N)/runs, "ns/packet")
	b.ReportMetric(0, "ns/op")
}

// The cost of translating a packet, beside that of one that needs none.
func BenchmarkServicePacket(b *testing.B) {
	b.Run("empty program", func(b *testing.B) {
		w := lbBench(b, nil)
		empty, err := ebpf.NewProgram(&ebpf.ProgramSpec{
			Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
		})
		if err != nil {
			b.Fatal(err)
		}
		defer empty.Close()
		measureFresh(b, w, empty, tcp(b, at(podA4, 1), at(far4, 2), ack, 1, 1, 100))
	})
	for _, n := range []int{10, 10000} {
		for _, c := range []struct {
			name    string
			service Service
			packet  tuple
			program string
		}{
			{"none", Service{Frontend: Frontend{vip4, 80, 6}, ID: 99999, Backends: backends(at(far4, 80))}, tuple{at(podA4, 1000), at(far4, 80), 6}, tcProgFromPod},
			{"pod", Service{Frontend: Frontend{vip4, 80, 6}, ID: 99999, Backends: backends(at(far4, 80))}, tuple{at(podA4, 1000), at(vip4, 80), 6}, tcProgFromPod},
			{"outside here", Service{Frontend: Frontend{any4, 30080, 6}, Kind: NodePort, ID: 99999, Backends: backends(at(podB4, 80))}, tuple{at(out4, 1000), at(node4, 30080), 6}, tcProgFromNetwork},
			{"outside there", Service{Frontend: Frontend{any4, 30080, 6}, Kind: NodePort, ID: 99999, Backends: backends(at(far4, 80))}, tuple{at(out4, 1000), at(node4, 30080), 6}, tcProgFromNetwork},
		} {
			b.Run(fmt.Sprintf("%s, %d services", c.name, n), func(b *testing.B) {
				w := lbBench(b, func(cfg *Config) {
					cfg.RingBytes, cfg.ServicesMax, cfg.BackendsMax = 128<<20, 65536, 262144
				})
				w.upsert(manyServices(n, 10, Random)...)
				w.upsert(c.service)
				for _, a := range []netip.Addr{podA4, podA6} {
					if err := w.Endpoints().Upsert(a, Endpoint{ID: epA, Identity: idA, IfIndex: loopback}); err != nil {
						b.Fatal(err)
					}
				}
				measureFresh(b, w, w.coll.Programs[c.program], c.packet.packet(b, ack, 100))
			})
		}
	}
}
