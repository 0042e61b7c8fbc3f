// SPDX-License-Identifier: Apache-2.0

package policy

import "github.com/weirmesh/weir/internal/labelset"

// Selector is a label selector, with what its policy's scope adds to it (spec 3.2 to 3.4).
type Selector struct{}

// Matches reports whether it selects something with these labels. A nil selector selects nothing.
func (s *Selector) Matches(labels labelset.Set) bool { return false }

// Key is its canonical text: equal for selectors that are written alike but for order.
func (s *Selector) Key() string { return "" }
