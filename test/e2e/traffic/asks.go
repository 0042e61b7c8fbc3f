// SPDX-License-Identifier: Apache-2.0

package traffic

import (
	"context"
	"net/netip"
	"sync"
	"time"
)

// Asks is what many questions to WhoPort got.
type Asks struct {
	// Servers counts answers by who gave them.
	Servers map[string]int `json:"servers"`
	// Clients counts answers by the client address that the server saw.
	Clients map[string]int `json:"clients"`
	// Resent counts questions over UDP that got no answer and were asked a second time: whoever ends takes what waits in its socket along.
	Resent int `json:"resent"`
	// Failed questions; the first ten errors.
	Failed int      `json:"failed"`
	Errors []string `json:"errors,omitempty"`
}

// AskMany asks again and again, on a socket of its own each time, until the time is over or the count reached (0 = no limit). A question fails
// after limit.
func AskMany(ctx context.Context, network string, to netip.AddrPort, over time.Duration, count int, limit time.Duration, parallel int) Asks {
	all := Asks{Servers: map[string]int{}, Clients: map[string]int{}}
	end := time.Now().Add(over)
	var mu sync.Mutex
	asked := 0
	var wg sync.WaitGroup
	for range max(1, parallel) {
		wg.Go(func() {
			for {
				mu.Lock()
				if ctx.Err() != nil || time.Now().After(end) || count > 0 && asked >= count {
					mu.Unlock()
					return
				}
				asked++
				mu.Unlock()
				a, err := Ask(network, to, limit)
				again := err != nil && network != "tcp"
				if again {
					a, err = Ask(network, to, limit)
				}
				mu.Lock()
				if again {
					all.Resent++
				}
				if err != nil {
					all.Failed++
					if len(all.Errors) < 10 {
						all.Errors = append(all.Errors, err.Error())
					}
				} else {
					all.Servers[a.Server]++
					all.Clients[a.Client.Addr().String()]++
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return all
}
