// SPDX-License-Identifier: Apache-2.0

package l7bench

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"github.com/weirmesh/weir/test/e2e/httpload"
)

// Bench is where servers and loads run, each in a process of its own: what else this process does, takes no part in a measurement.
type Bench struct {
	// Bin is the folder of the binaries.
	Bin string
	// LoadCPU is the CPU that they share; the proxies have the other.
	LoadCPU int
}

// urgent has a command go before everything else on its CPU. At a rate, who would wait for its turn would measure that.
var urgent = []string{"chrt", "--fifo", "1"}

// Origin starts the server behind the proxies.
func (b Bench) Origin(ctx context.Context, dir, address string) (*Process, error) {
	return start(ctx, "origin", b.LoadCPU, dir, address, b.traffic(), "origin", address)
}

// UrgentOrigin is an Origin that goes before everything else on its CPU.
func (b Bench) UrgentOrigin(ctx context.Context, dir, address string) (*Process, error) {
	args := append(append([]string{}, urgent[1:]...), b.traffic(), "origin", address)
	return start(ctx, "urgent-origin", b.LoadCPU, dir, address, urgent[0], args...)
}

// Sink starts a server that takes large bodies. It and Flood give way to everything else on their CPU.
func (b Bench) Sink(ctx context.Context, dir, address string) (*Process, error) {
	return start(ctx, "sink", b.LoadCPU, dir, address, "nice", "-n", "19", b.traffic(), "sink", address)
}

// Load makes requests. At a rate it is urgent; as fast as may be it is not: it would take the turns of the server and of who takes the access log.
func (b Bench) Load(ctx context.Context, address string, connections int, rate float64, over time.Duration) (r httpload.Result, err error) {
	var first []string
	if rate > 0 {
		first = urgent
	}
	err = b.run(ctx, &r, first, "http-load", address, strconv.Itoa(connections), strconv.FormatFloat(rate, 'f', -1, 64), over.String())
	return r, err
}

// Flood does what a tenant can who means ill.
func (b Bench) Flood(ctx context.Context, address string, over time.Duration) (f httpload.Flooded, err error) {
	err = b.run(ctx, &f, []string{"nice", "-n", "19"}, "http-flood", address, over.String())
	return f, err
}

// run runs e2e-traffic behind a prefix of its command, and decodes what it says.
func (b Bench) run(ctx context.Context, into any, prefix []string, verb string, args ...string) error {
	all := append([]string{"-c", strconv.Itoa(b.LoadCPU)}, prefix...)
	cmd := exec.CommandContext(ctx, "taskset", append(append(all, b.traffic(), verb), args...)...)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err == nil {
		err = json.Unmarshal(out, into)
	}
	if err != nil {
		return fmt.Errorf("%s on %s: %w", verb, args[0], err)
	}
	return nil
}

func (b Bench) traffic() string { return filepath.Join(b.Bin, "e2e-traffic") }
