// SPDX-License-Identifier: Apache-2.0

package lab

import "github.com/weirmesh/weir/lab/internal/part"

// together are the central services; in one process as soon as each of them can be imported.
func (l *Lab) together() ([]part.Definition, error) { return l.separate() }
