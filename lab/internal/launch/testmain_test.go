// SPDX-License-Identifier: Apache-2.0

package launch_test

import (
	"fmt"
	"os"
	"testing"

	"github.com/weirmesh/weir/lab/internal/launch"
)

// TestMain lets the test binary stand in for weir-lab.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == "run-in" {
		spec, err := launch.ReadSpec()
		if err == nil {
			err = spec.Run()
		}
		fmt.Fprintln(os.Stderr, err)
		os.Exit(launch.ExitCode(err))
	}
	os.Exit(m.Run())
}
