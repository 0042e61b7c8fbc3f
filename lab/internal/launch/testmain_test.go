// SPDX-License-Identifier: Apache-2.0

package launch_test

import (
	"os"
	"testing"

	"github.com/weirmesh/weir/lab/internal/launch"
)

// TestMain lets the test binary stand in for weir-lab.
func TestMain(m *testing.M) {
	launch.Intercept()
	os.Exit(m.Run())
}
