// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// setSysctls writes values under /proc/sys/net of the calling thread's namespace, given as "ipv4/ip_forward=1". An interface's name may hold
// dots, so paths are written with slashes. What already has the value is not written: a write to `forwarding` resets others.
func setSysctls(settings ...string) error {
	var errs []error
	for _, s := range settings {
		name, value, _ := strings.Cut(s, "=")
		path := filepath.Join("/proc/sys/net", name)
		old, err := os.ReadFile(path)
		if err == nil && strings.TrimSpace(string(old)) == value {
			continue
		}
		if err := os.WriteFile(path, []byte(value), 0); err != nil {
			errs = append(errs, fmt.Errorf("set %s to %s: %w", name, value, err))
		}
	}
	return errors.Join(errs...)
}
