// SPDX-License-Identifier: Apache-2.0

// Command weir-lab builds and runs a cluster inside one machine.
package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/weirmesh/weir/lab/internal/command"
	"github.com/weirmesh/weir/lab/internal/launch"
)

func main() {
	// Before anything else is set up: this process is on its way to being another program.
	if len(os.Args) == 2 && os.Args[1] == "run-in" {
		runIn()
	}
	if err := command.Root().Execute(); err != nil {
		if !errors.Is(err, command.ErrSaid) {
			fmt.Fprintln(os.Stderr, "weir-lab:", err)
		}
		os.Exit(1)
	}
}

// runIn becomes the program that the launch description names.
func runIn() {
	spec, err := launch.ReadSpec()
	if err == nil {
		err = spec.Run()
	}
	fmt.Fprintln(os.Stderr, "weir-lab: run-in:", err)
	os.Exit(launch.ExitCode(err))
}
