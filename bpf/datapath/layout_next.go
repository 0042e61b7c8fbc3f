// SPDX-License-Identifier: Apache-2.0

//go:build weir_next_layout

package datapath

// This build stands for the next version of Weir in tests of upgrades, and is never released: its connections have eight bytes more, and its programs
// use them. It brings the conversion that such a change ships with.

// ctLayout is the layout of ct, by which its pin is named.
const ctLayout = 3

// ctBefore is the released layout of ct.
var ctBefore = olderLayout{2, 176, func([]byte) {}}
