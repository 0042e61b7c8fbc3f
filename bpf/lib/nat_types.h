/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Masquerading: a pod's packets leave with the node's address and a claimed port. */
#ifndef WEIR_NAT_TYPES_H
#define WEIR_NAT_TYPES_H

#include "addr.h"

/* nat_key: a tuple as a packet has it. Two rows belong to a claim: kind NAT_OUT (pod, peer), kind NAT_IN (peer, node). */
struct nat_key {
	struct addr src;
	struct addr dst;
	__be16 sport;
	__be16 dport;
	__u8 proto;
	__u8 kind;
	__u8 pad[2];
};

enum nat_kind {
	NAT_OUT = 0,
	NAT_IN = 1,
};

struct nat_entry {
	struct addr addr; /* OUT: the new source; IN: the new destination */
	__be16 port;
	__u8 pad[6];
	__u64 last;       /* CLOCK_MONOTONIC ns of the last packet this way */
};

#endif
