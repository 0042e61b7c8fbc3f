/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Policy as the kernel has it: for each endpoint and direction a policy number, for each policy and peer a block of
 * port ranges. Only one row speaks for a peer, so that nothing here knows of precedence. */
#ifndef WEIR_POLICY_TYPES_H
#define WEIR_POLICY_TYPES_H

#include "addr.h"

#define HOST_ENDPOINT 65535

#define POLICY_NUMBER 0x3fffffff /* 0 = not enforced */
#define POLICY_AUDIT  0x80000000 /* what would be dropped passes, and is told */

enum policy_verdict {
	POLICY_NONE = 0, /* the direction is not enforced */
	POLICY_ALLOW = 1,
	POLICY_DEFAULT_DENY = 2, /* no rule allows it */
	POLICY_DENY = 3,	 /* a deny rule */
	POLICY_REDIRECT = 4,	 /* allowed through the proxy's slot, and not without it */
	POLICY_VISIBLE = 5,	 /* allowed; through the slot, while that has a listener, to be seen */
};

struct policy_peer_key {
	__u32 policy;
	__u32 peer; /* identity, or a number of the agent above them; 0 = any other peer */
};

/* policy_peer: two words, each written at once, tied together by the check: an element that was freed and used again
 * while a program looks at it shows in it. */
struct policy_peer {
	__u64 block; /* first range << 32 | count of ranges */
	__u64 check; /* policy_check of the key and the block */
};

/* A range holds from its start to the start of the next one of its block. A block begins at start 0. */
#define POLICY_RANGE_START(range)   ((__u32)((range) >> 40))
#define POLICY_RANGE_VERDICT(range) ((__u8)((range) >> 32))
#define POLICY_RANGE_RULE(range)    ((__u32)(range)) /* slot and rule */
#define POLICY_BLOCK_BITS	    18		     /* a block has fewer than 2^18 ranges */

/* The low word of a range, which a connection keeps: slot << 20 | rule. */
#define RULE_BITS  20
#define RULE_OF(w) ((w) & ((1U << RULE_BITS) - 1))
#define SLOT_OF(w) ((w) >> RULE_BITS)
#define SLOTS	   4096 /* 0 = none */

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, HOST_ENDPOINT + 1);
	__type(key, __u32);
	__type(value, __u64);
} policy_endpoints SEC(".maps"); /* by endpoint: ingress | egress << 32, each number and audit bit; written:
				    datapath.Policies; read: tc programs */

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 262144); /* sized */
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct policy_peer_key);
	__type(value, struct policy_peer);
} policy_peers SEC(".maps"); /* written: datapath.Policies; read: tc programs */

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 262144); /* sized */
	__type(key, __u32);
	__type(value, __u64);
} policy_ranges SEC(".maps"); /* start << 40 | verdict << 32 | slot << 20 | rule, start = protocol << 16 | first port;
				 written: datapath.Policies; read: tc programs */

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} policy_generation SEC(".maps"); /* written: datapath.Policies; read: tc programs */

/* What policies allow by the names of outside addresses. Only weir-dns writes these three. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536); /* sized */
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct addr);
	__type(value, __u32);
} fqdn SEC(".maps"); /* number of the set of name selectors that an address matches; written: datapath.Names; read: tc
			programs */

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536); /* sized */
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct policy_peer_key);
	__type(value, struct policy_peer);
} fqdn_peers SEC(".maps"); /* peer = number of a set; written: datapath.Names; read: tc programs */

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 131072); /* sized */
	__type(key, __u32);
	__type(value, __u64);
} fqdn_ranges SEC(".maps"); /* as policy_ranges; written: datapath.Names; read: tc programs */

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, SLOTS);
	__type(key, __u32);
	__type(value, __u32);
} slots SEC(".maps"); /* port of a slot's listener on 127.0.0.1 and ::1, host order; 0 = there is none; written:
			 datapath.Slots; read: tc programs */

#endif
