/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Masquerading: a pod's packets leave with the node's address and a claimed port. */
#ifndef WEIR_NAT_TYPES_H
#define WEIR_NAT_TYPES_H

#include "addr.h"

enum nat_kind {
	NAT_OUT = 0,	/* the pod's packet before translation */
	NAT_IN = 1,	/* the answer before translation; making this row is claiming the port */
	LB_FORWARD = 2, /* see struct lb_entry */
	LB_REVERSE = 3,
};

/* nat_key: a tuple as a packet has it. A claim is two rows, one of each kind. ICMP echo: the asking side's port is the
 * id, the other's 0. */
struct nat_key {
	struct addr src;
	struct addr dst;
	__be16 sport;
	__be16 dport;
	__u8 proto;
	__u8 kind; /* enum nat_kind */
	__u8 pad[2];
};

struct nat_entry {
	struct addr addr; /* OUT: the new source; IN: the new destination */
	__be16 port;
	__u8 pad[6];
};

#endif
