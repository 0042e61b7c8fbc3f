// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"time"

	"github.com/weirmesh/weir/test/e2e/traffic"
)

const probeUsage = "ask NETWORK ADDRESS:PORT TIMEOUT | path-mtu ADDRESS SIZE... | transfer ADDRESS BYTES | ping ADDRESS"

// probe asks one question and prints, as JSON, what it saw.
func probe(ctx context.Context, what string, args []string) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	if what == "ask" {
		if len(args) != 3 {
			return errors.New("usage: e2e-traffic " + probeUsage)
		}
		to, err := netip.ParseAddrPort(args[1])
		if err != nil {
			return fmt.Errorf("address %q: %w", args[1], err)
		}
		limit, err := time.ParseDuration(args[2])
		if err != nil {
			return fmt.Errorf("timeout %q: %w", args[2], err)
		}
		saw, err := traffic.Ask(args[0], to, limit)
		return errors.Join(err, json.NewEncoder(os.Stdout).Encode(saw))
	}
	to, err := netip.ParseAddr(args[0])
	if err != nil {
		return fmt.Errorf("address %q: %w", args[0], err)
	}
	var numbers []int
	for _, text := range args[1:] {
		n, err := strconv.Atoi(text)
		if err != nil || n < 64 || n > 1<<30 {
			return fmt.Errorf("size %q: want 64 or more", text)
		}
		numbers = append(numbers, n)
	}
	switch {
	case what == "path-mtu" && len(numbers) > 0:
		saw, err := traffic.PathMTU(to, numbers)
		return errors.Join(err, json.NewEncoder(os.Stdout).Encode(saw))
	case what == "transfer" && len(numbers) == 1:
		return traffic.Transfer(ctx, to, numbers[0])
	case what == "ping" && len(numbers) == 0:
		return traffic.Ping(ctx, to)
	}
	return errors.New("usage: e2e-traffic " + probeUsage)
}
