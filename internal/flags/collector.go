// SPDX-License-Identifier: Apache-2.0

package flags

import (
	"os"
	"runtime/debug"
)

// Collector trades memory for CPU, within a bound: garbage is collected when the heap has grown by percent, and more often above memory bytes. 0 leaves either
// as it is, and so does the operator's own GOGC or GOMEMLIMIT.
func Collector(percent int, memory int64) {
	if percent > 0 && os.Getenv("GOGC") == "" {
		debug.SetGCPercent(percent)
	}
	if memory > 0 && os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(memory)
	}
}
