// SPDX-License-Identifier: Apache-2.0

package live

import (
	"fmt"
	"os/exec"
	"path/filepath"
)

// Process is a program that runs in a place of the lab. Close ends it.
type Process struct{ command *exec.Cmd }

// Start runs a program in a place such as "node/n1": in its namespace and control group.
func (l *Lab) Start(place string, args ...string) (*Process, error) {
	// weir-lab turns into the program, so the process is the program.
	command := exec.Command(filepath.Join(l.bin, "weir-lab"), append([]string{"exec", "--name", l.Name, place, "--"}, args...)...)
	if err := command.Start(); err != nil {
		return nil, fmt.Errorf("start %s in %s: %w", args[0], place, err)
	}
	return &Process{command}, nil
}

// Close kills the program.
func (p *Process) Close() {
	_ = p.command.Process.Kill()
	_ = p.command.Wait()
}
