// SPDX-License-Identifier: Apache-2.0

// The weir command: see what flows through the mesh, and how the mesh is.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
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
		Program:  find,
		Start:    start,
		Version:  version,
	}, os.Args[1:])
}

// execLab replaces this process by the weir-lab beside it, or the one in PATH.
func execLab(args []string) error {
	path, err := find("weir-lab")
	if err != nil {
		return err
	}
	return syscall.Exec(path, append([]string{path}, args...), os.Environ())
}

// find looks for a program beside this one, then in PATH.
func find(name string) (string, error) {
	self, err := os.Executable()
	if err == nil {
		if self, err = filepath.EvalSymlinks(self); err == nil {
			if path, err := exec.LookPath(filepath.Join(filepath.Dir(self), name)); err == nil {
				return path, nil
			}
		}
	}
	path, err := exec.LookPath(name)
	if errors.Is(err, exec.ErrNotFound) {
		return "", fmt.Errorf("%s is neither beside weir nor in PATH: %w", name, err)
	}
	return path, err
}

// start runs a program in this process's surroundings.
func start(ctx context.Context, path string, args []string, out, errOut io.Writer) error {
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Stdout, cmd.Stderr = out, errOut
	return cmd.Run()
}
