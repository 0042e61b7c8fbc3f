// SPDX-License-Identifier: Apache-2.0

package names

import (
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// Loaded is what became of a load of queries.
type Loaded struct {
	Queries, Failed int
	Took            time.Duration
	// Median and P99 of the latency.
	Median, P99 time.Duration
}

// Load asks for a name over and over, on so many sockets of this namespace at a time: as fast as answers come with rate 0, else that often in all.
func Load(server netip.AddrPort, name string, sockets int, rate float64, over time.Duration) (Loaded, error) {
	var mu sync.Mutex
	var wg sync.WaitGroup
	var total Loaded
	var latencies []time.Duration
	begun := time.Now()
	for i := range sockets {
		conn, err := net.Dial("udp", server.String())
		if err != nil {
			return total, fmt.Errorf("load: %w", err)
		}
		defer conn.Close()
		wg.Go(func() {
			var every time.Duration
			due := begun
			if rate > 0 {
				every = time.Duration(float64(sockets) / rate * float64(time.Second))
				due = begun.Add(every * time.Duration(i) / time.Duration(sockets))
			}
			var own []time.Duration
			failed := 0
			for buf := make([]byte, 4096); time.Since(begun) < over; {
				if every > 0 {
					time.Sleep(time.Until(due))
					due = due.Add(every)
				}
				from := time.Now()
				if err := once(conn, name, buf); err != nil {
					failed++
					continue
				}
				own = append(own, time.Since(from))
			}
			mu.Lock()
			defer mu.Unlock()
			total.Queries += len(own)
			total.Failed += failed
			latencies = append(latencies, own...)
		})
	}
	wg.Wait()
	total.Took = time.Since(begun)
	slices.Sort(latencies)
	if len(latencies) > 0 {
		total.Median, total.P99 = latencies[len(latencies)/2], latencies[len(latencies)*99/100]
	}
	return total, nil
}

func once(conn net.Conn, name string, buf []byte) error {
	id := uint16(rand.Uint32())
	query, err := question(id, name, dnsmessage.TypeA)
	if err != nil {
		return err
	}
	if err := conn.SetDeadline(time.Now().Add(2 * time.Second)); err != nil {
		return err
	}
	if _, err := conn.Write(query); err != nil {
		return err
	}
	for {
		n, err := conn.Read(buf)
		if err != nil {
			return err
		}
		var p dnsmessage.Parser
		h, err := p.Start(buf[:n])
		if err != nil || h.ID != id {
			continue // a late answer to an earlier query
		}
		if h.RCode != dnsmessage.RCodeSuccess {
			return fmt.Errorf("code %s", h.RCode)
		}
		return nil
	}
}
