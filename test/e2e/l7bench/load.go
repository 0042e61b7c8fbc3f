// SPDX-License-Identifier: Apache-2.0

package l7bench

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"github.com/weirmesh/weir/test/e2e/httpload"
)

// Bench is where processes run, and the folder of the binaries.
type Bench struct {
	Bin string
	// ProxyCPU is the proxies', LoadCPU that of servers and loads.
	ProxyCPU, LoadCPU int
}

// Origin starts the server behind the proxies, in a process of its own.
func (b Bench) Origin(ctx context.Context, dir, address string) (*Process, error) {
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, fmt.Errorf("start origin: %w", err)
	}
	return start(ctx, "origin-"+port, b.LoadCPU, dir, address, b.traffic(), "origin", address)
}

// Load makes requests in a process of its own: what else this one does, takes part in nothing. At a rate it goes before everything else on its CPU: a
// generator that waits for its turn would measure that. As fast as may be it does not: it would take the turns of the server and of who takes the log.
func (b Bench) Load(ctx context.Context, address string, connections int, rate float64, over time.Duration) (r httpload.Result, err error) {
	args := []string{"-c", strconv.Itoa(b.LoadCPU)}
	if rate > 0 {
		args = append(args, "chrt", "--fifo", "1")
	}
	args = append(args, b.traffic(), "http-load", address, strconv.Itoa(connections), strconv.FormatFloat(rate, 'f', -1, 64), over.String())
	cmd := exec.CommandContext(ctx, "taskset", args...)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return r, fmt.Errorf("load on %s: %w", address, err)
	}
	if err := json.Unmarshal(out, &r); err != nil {
		return r, fmt.Errorf("load on %s: %w", address, err)
	}
	return r, nil
}

func (b Bench) traffic() string { return filepath.Join(b.Bin, "e2e-traffic") }
