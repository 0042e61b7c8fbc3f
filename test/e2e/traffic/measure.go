// SPDX-License-Identifier: Apache-2.0

package traffic

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// Ports of the servers that MeasureServe opens.
const (
	echoPort   = 7100
	sinkPort   = 7101
	acceptPort = 7102
)

// MeasureServe runs the servers of the benchmarks until ctx ends.
func MeasureServe(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	for _, s := range []struct {
		port   int
		handle func(net.Conn)
	}{
		{echoPort, func(c net.Conn) { _, _ = io.Copy(c, c) }},
		{sinkPort, func(c net.Conn) { _, _ = io.CopyBuffer(struct{ io.Writer }{io.Discard}, c, make([]byte, 1<<18)) }},
		{acceptPort, func(c net.Conn) { _, _ = c.Read(make([]byte, 1)) }},
	} {
		ln, err := net.Listen("tcp", fmt.Sprintf(":%d", s.port))
		if err != nil {
			return fmt.Errorf("measure: %w", err)
		}
		context.AfterFunc(ctx, func() { ln.Close() })
		wg.Go(func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					s.handle(c)
				}()
			}
		})
	}
	sink, err := net.ListenPacket("udp", fmt.Sprintf(":%d", echoPort)) // the last: Ready looks for it
	if err != nil {
		return fmt.Errorf("measure: %w", err)
	}
	context.AfterFunc(ctx, func() { sink.Close() })
	wg.Go(func() { countDatagrams(sink) })
	<-ctx.Done()
	return nil
}

// report asks countDatagrams how many others came from the same socket.
var report = []byte("report")

// countDatagrams counts datagrams by their sender until the socket closes.
func countDatagrams(sink net.PacketConn) {
	_ = sink.(*net.UDPConn).SetReadBuffer(16 << 20)
	counts := map[netip.AddrPort]uint64{}
	b := make([]byte, 100)
	for {
		n, from, err := sink.(*net.UDPConn).ReadFromUDPAddrPort(b)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue
		}
		if bytes.Equal(b[:n], report) {
			_, _ = sink.(*net.UDPConn).WriteToUDPAddrPort(binary.BigEndian.AppendUint64(nil, counts[from]), from)
			continue
		}
		counts[from]++
	}
}

// measurePackets sends datagrams as fast as it can and returns how many a second arrived.
func measurePackets(to netip.Addr, d time.Duration) (float64, error) {
	c, err := net.Dial("udp", netip.AddrPortFrom(to, echoPort).String())
	if err != nil {
		return 0, err
	}
	defer c.Close()
	start := time.Now()
	for msg := make([]byte, 64); time.Since(start) < d; {
		if _, err := c.Write(msg); err != nil {
			return 0, err
		}
	}
	took := time.Since(start)
	answer := make([]byte, 8)
	for range 20 { // a report may be lost as any packet
		if _, err := c.Write(report); err != nil {
			return 0, err
		}
		if err := c.SetReadDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
			return 0, err
		}
		if _, err := io.ReadFull(c, answer); err == nil {
			return float64(binary.BigEndian.Uint64(answer)) / took.Seconds(), nil
		}
	}
	return 0, errors.New("no report of the datagrams that arrived")
}

// Measure takes one measurement of what ("rtt": median round trip in microseconds, "throughput": MB/s,
// "connections": TCP connections made and ended per second, one after the other on each of two workers, "packets": UDP datagrams
// that arrive per second).
func Measure(what string, to netip.Addr, d time.Duration) (float64, error) {
	switch what {
	case "rtt":
		return measureRTT(to, d)
	case "throughput":
		return measureThroughput(to, d)
	case "connections":
		return measureConnections(to, d)
	case "packets":
		return measurePackets(to, d)
	}
	return 0, fmt.Errorf("measure %q: want rtt, throughput, connections or packets", what)
}

func dialMeasure(to netip.Addr, port uint16) (net.Conn, error) {
	return net.DialTimeout("tcp", netip.AddrPortFrom(to, port).String(), 5*time.Second)
}

func measureRTT(to netip.Addr, d time.Duration) (float64, error) {
	c, err := dialMeasure(to, echoPort)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	var samples []float64
	buf := make([]byte, 1)
	for end := time.Now().Add(d); time.Now().Before(end); {
		start := time.Now()
		if _, err := c.Write(buf); err != nil {
			return 0, err
		}
		if _, err := io.ReadFull(c, buf); err != nil {
			return 0, err
		}
		samples = append(samples, float64(time.Since(start).Nanoseconds())/1000)
	}
	slices.Sort(samples)
	return samples[len(samples)/2], nil
}

func measureThroughput(to netip.Addr, d time.Duration) (float64, error) {
	c, err := dialMeasure(to, sinkPort)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	buf := make([]byte, 1<<17)
	var sent int64
	start := time.Now()
	for time.Since(start) < d {
		n, err := c.Write(buf)
		if err != nil {
			return 0, err
		}
		sent += int64(n)
	}
	return float64(sent) / 1e6 / time.Since(start).Seconds(), nil
}

func measureConnections(to netip.Addr, d time.Duration) (float64, error) {
	var (
		wg    sync.WaitGroup
		mu    sync.Mutex
		total int
		errs  []error
	)
	start := time.Now()
	for range 2 {
		wg.Go(func() {
			n := 0
			for time.Since(start) < d {
				c, err := dialMeasure(to, acceptPort)
				if err != nil {
					mu.Lock()
					errs = append(errs, err)
					mu.Unlock()
					return
				}
				// A reset instead of TIME_WAIT, so that ports do not run out; the server has read EOF or an error either way.
				_ = c.(*net.TCPConn).SetLinger(0)
				c.Close()
				n++
			}
			mu.Lock()
			total += n
			mu.Unlock()
		})
	}
	wg.Wait()
	return float64(total) / time.Since(start).Seconds(), errors.Join(errs...)
}
