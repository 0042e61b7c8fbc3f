// SPDX-License-Identifier: Apache-2.0

// The weir command: see what flows through the mesh, and how the mesh is.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/term"

	"github.com/weirmesh/weir/cli"
)

// version is set by the linker.
var version = "unknown"

func main() {
	os.Exit(run())
}

func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	// A second signal ends the process at once.
	context.AfterFunc(ctx, stop)
	return cli.Run(ctx, cli.Env{
		In: os.Stdin, Out: os.Stdout, Err: os.Stderr,
		Terminal: term.IsTerminal(int(os.Stdout.Fd())),
		Lookup:   os.LookupEnv,
		Now:      time.Now,
		Exec:     execLab,
		Version:  version,
	}, os.Args[1:])
}

// execLab replaces this process by the weir-lab beside it, or the one in PATH.
func execLab(args []string) error {
	path, err := findLab()
	if err != nil {
		return err
	}
	return syscall.Exec(path, append([]string{path}, args...), os.Environ())
}

func findLab() (string, error) {
	self, err := os.Executable()
	if err == nil {
		if self, err = filepath.EvalSymlinks(self); err == nil {
			beside := filepath.Join(filepath.Dir(self), "weir-lab")
			if path, err := exec.LookPath(beside); err == nil {
				return path, nil
			}
		}
	}
	path, err := exec.LookPath("weir-lab")
	if errors.Is(err, exec.ErrNotFound) {
		return "", fmt.Errorf("weir-lab is neither beside weir nor in PATH: %w", err)
	}
	return path, err
}
