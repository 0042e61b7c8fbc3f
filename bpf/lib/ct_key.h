/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The key of a connection. */
#ifndef WEIR_CT_KEY_H
#define WEIR_CT_KEY_H

#include "ct_types.h"

/* ct_key_make sorts the ends; it returns whether the packet's source is the lower one. */
static __always_inline bool ct_key_make(struct ct_key *k, const struct addr *src, const struct addr *dst, __be16 sport,
					__be16 dport)
{
	bool src_is_lo;

	if (src->hi != dst->hi)
		src_is_lo = src->hi < dst->hi;
	else if (src->lo != dst->lo)
		src_is_lo = src->lo < dst->lo;
	else
		src_is_lo = sport <= dport;
	k->lo = src_is_lo ? *src : *dst;
	k->hi = src_is_lo ? *dst : *src;
	k->lo_port = src_is_lo ? sport : dport;
	k->hi_port = src_is_lo ? dport : sport;
	return src_is_lo;
}

static __always_inline __u64 ct_tail(const struct ct_key *k)
{
	return *(const __u64 *)&k->lo_port;
}

#endif
