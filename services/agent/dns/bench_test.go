// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	mdns "github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/bpf/datapath"
)

// reflector answers every query for one name with the same answer, as cheaply as can be.
func (w *world) reflector(h *host, answer []byte) {
	w.Helper()
	var c net.PacketConn
	w.do(inside(h.ns, func() (err error) {
		c, err = net.ListenPacket("udp", netip.AddrPortFrom(h.v4, 53).String())
		return err
	}))
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		udp, _ := c.(*net.UDPConn)
		buf, out := make([]byte, 512), append([]byte(nil), answer...)
		for {
			n, from, err := udp.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			if n > 2 {
				copy(out, buf[:2])
				_, _ = udp.WriteToUDPAddrPort(out, from) // the client notices
			}
		}
	}()
	w.Cleanup(func() { _ = c.Close(); <-ended })
}

// BenchmarkQueries asks for one known name from 8 sockets, one query at a time on each; "direct" is the same without a proxy. Reported beside: CPU time of
// weir-dns for a query.
func BenchmarkQueries(b *testing.B) {
	w := newWorld(b)
	question := new(mdns.Msg).SetQuestion("web.example.", mdns.TypeA)
	query, err := question.Pack()
	w.do(err)
	reply := new(mdns.Msg).SetReply(question)
	for _, text := range []string{"web.example. 60 IN A 172.30.0.81", "web.example. 60 IN A 172.30.0.82"} {
		r, err := mdns.NewRR(text)
		w.do(err)
		reply.Answer = append(reply.Answer, r)
	}
	reply.Compress = true
	answer, err := reply.Pack()
	w.do(err)
	w.reflector(w.server, answer)
	w.agent.set(allow("*.example"), toNames(8080, "*.example"))
	run := func(name string) {
		b.Run(name, func(b *testing.B) {
			cpu := w.cpu()
			b.ResetTimer()
			w.load8(b, query, b.N)
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "queries/s")
			b.ReportMetric(float64((w.cpu()-cpu).Nanoseconds())/float64(b.N), "dns-cpu-ns/op")
		})
	}
	run("proxied")
	w.do(w.Policies().SetEndpoint(clientID, datapath.EndpointPolicy{}), w.Policies().Bump())
	run("direct")
}

// cpu is what the weir-dns process has used.
func (w *world) cpu() time.Duration {
	w.Helper()
	var ts unix.Timespec
	// The clock of another process (CPUCLOCK_SCHED of MAKE_PROCESS_CPUCLOCK).
	clock := int32(^w.dns.Process.Pid)<<3 | 2
	w.do(unix.ClockGettime(clock, &ts))
	return time.Duration(ts.Nano())
}

func (w *world) load8(b *testing.B, query []byte, n int) {
	b.Helper()
	var left atomic.Int64
	left.Store(int64(n))
	var group sync.WaitGroup
	for i := range 8 {
		c, err := w.dial("udp", netip.AddrPortFrom(w.server.v4, 53))
		w.do(err)
		group.Go(func() {
			defer func() { _ = c.Close() }()
			msg, buf := append([]byte(nil), query...), make([]byte, 512)
			for id := uint16(i); left.Add(-1) >= 0; id++ {
				msg[0], msg[1] = byte(id>>8), byte(id)
				if err := ask(c, msg, buf); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	group.Wait()
}

// ask sends a query until its answer comes.
func ask(c net.Conn, msg, buf []byte) error {
	for range 5 {
		if _, err := c.Write(msg); err != nil {
			return err
		}
		for {
			if err := c.SetReadDeadline(time.Now().Add(time.Second)); err != nil {
				return err
			}
			n, err := c.Read(buf)
			if err != nil {
				break
			}
			if n > 4 && buf[0] == msg[0] && buf[1] == msg[1] && buf[3]&0xf == 0 {
				return nil
			}
		}
	}
	return fmt.Errorf("no answer to query %d", uint16(msg[0])<<8|uint16(msg[1]))
}
