// SPDX-License-Identifier: Apache-2.0

//go:build !weir_next_layout

package datapath

import "unsafe"

// ctLayout is the layout of ct, by which its pin is named.
const ctLayout = 2

// ctBefore is the layout of ct that is converted: connections had no verdict.
var ctBefore = olderLayout{1, 168, func(v []byte) {
	// Who began it was taken for its direction.
	e := unsafe.Offsetof(tcCtEntry{}.Conn)
	v[e+unsafe.Offsetof(tcCtConn{}.PolicyDirection)] = v[e+unsafe.Offsetof(tcCtConn{}.Direction)]
	v[e+unsafe.Offsetof(tcCtConn{}.Verdict)] = 0
}}
