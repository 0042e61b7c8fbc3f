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
	// Before anything else is set up: this process may be on its way to being another program.
	launch.Intercept()
	if err := command.Root().Execute(); err != nil {
		if !errors.Is(err, command.ErrSaid) {
			fmt.Fprintln(os.Stderr, "weir-lab:", err)
		}
		os.Exit(1)
	}
}
