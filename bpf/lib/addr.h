/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Addresses: always 16 bytes in network order; IPv4 is kept as ::ffff:a.b.c.d, so that one path serves both families.
 */
#ifndef WEIR_ADDR_H
#define WEIR_ADDR_H

#include "vmlinux.h"
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

/* addr holds the two halves as they lie in a packet: network byte order, whatever the machine's. */
struct addr {
	__be64 hi;
	__be64 lo;
};

#define ADDR_V4_PREFIX ((__u64)bpf_htonl(0xffff))

static __always_inline void addr_from_v4(struct addr *a, __be32 v4)
{
	a->hi = 0;
	a->lo = ((__u64)v4 << 32) | ADDR_V4_PREFIX;
}

/* addr_from_words reads an address of a context, which the verifier lets be read in 32-bit words only: volatile keeps
 * them apart. */
static __always_inline void addr_from_words(struct addr *a, volatile __u32 *w)
{
	__u32 w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3];

	a->hi = (__u64)w1 << 32 | w0;
	a->lo = (__u64)w3 << 32 | w2;
}

static __always_inline bool addr_is_v4(const struct addr *a)
{
	return a->hi == 0 && (__u32)a->lo == (__u32)ADDR_V4_PREFIX;
}

static __always_inline __be32 addr_v4(const struct addr *a)
{
	return (__be32)(a->lo >> 32);
}

static __always_inline bool addr_equal(const struct addr *a, const struct addr *b)
{
	return a->hi == b->hi && a->lo == b->lo;
}

static __always_inline bool addr_is_zero(const struct addr *a)
{
	return (a->hi | a->lo) == 0;
}

#endif
