// SPDX-License-Identifier: Apache-2.0

package datapath

// The objects are made twice: as they are released, and with a ct of the next layout, for tests of upgrades (layout_next.go).

//go:generate -command tc bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel -cflags "-O2 -g -mcpu=v3 -Wall -Werror -I../include -I../lib" -type record -type traffic -type ct_conn -type record_type -type trace_point -type trace_reason -type direction -type known_bits -type record_flags -type drop_reason -type ct_state -type ct_flags -type ipcache_flags -type identity -type metric -type service_flags -type nat_kind -type lb_flags -type policy_verdict -type adopt_request -type adopt_kind -type adopt_result
//go:generate tc -tags !weir_next_layout tc tc.bpf.c
//go:generate tc -tags weir_next_layout -output-stem tc_next tc tc.bpf.c -- -DWEIR_NEXT_LAYOUT
//go:generate -command sock bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel -cflags "-O2 -g -mcpu=v3 -Wall -Werror -I../include -I../lib" -no-global-types
//go:generate sock -tags !weir_next_layout sock sock.bpf.c
//go:generate sock -tags weir_next_layout -output-stem sock_next sock sock.bpf.c -- -DWEIR_NEXT_LAYOUT
