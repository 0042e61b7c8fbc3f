/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Services in packets: what is kept of a connection, and whether a packet is to be translated at all. */
#ifndef WEIR_LB_STATE_H
#define WEIR_LB_STATE_H

#include "nat_types.h"
#include "scratch.h"
#include "service.h"

enum lb_flags {
	LB_HAIRPIN = 1, /* a pod that talks to itself: it sees the service's address as the client's */
	LB_CLOSING = 2, /* FIN or RST was seen: the next SYN begins another connection */
};

/* lb_entry: two rows a connection, by nat_key of the kinds LB_FORWARD (the packet as the client sent it) and LB_REVERSE
 * (the answer as the backend sends it; to a hairpin, to the service's address). */
struct lb_entry {
	struct addr addr; /* forward: the backend; reverse: the address that the client knows */
	__u64 expires;	  /* CLOCK_MONOTONIC ns */
	__u32 service;
	__u32 set; /* in which the backend was last found */
	__be16 port;
	__u8 flags; /* enum lb_flags */
	__u8 pad[5];
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 131072); /* sized */
	__type(key, struct nat_key);
	__type(value, struct lb_entry);
} lb SEC(".maps"); /* written and read: tc programs; collected: datapath.Services */

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} lb_host SEC(".maps"); /* how many sets have a backend that is a process of this node; written: datapath.Services;
			   read: to_network, which else has nothing to look up */

enum lb_kind {
	LB_NOTHING = 0,
	LB_SERVICE = 1,	      /* the packet goes to a service, which is in scratch */
	LB_HAIRPIN_REPLY = 2, /* the packet is a pod's answer to itself */
};

struct lb_scratch {
	struct service service;
	struct lb_entry entry; /* forward row of the packet's connection */
	__u32 kind;	       /* enum lb_kind */
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct lb_scratch);
} lb_scratch SEC(".maps"); /* tc programs only; not pinned */

static __always_inline struct lb_scratch *lb_scratch_get(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&lb_scratch, &zero);
}

static __always_inline bool lb_protocol(__u8 proto)
{
	return proto == IPPROTO_TCP || proto == IPPROTO_UDP || proto == IPPROTO_SCTP;
}

static __always_inline void lb_key(struct nat_key *key, const struct packet *p, __u8 kind)
{
	key->src = p->src;
	key->dst = p->dst;
	key->sport = p->sport;
	key->dport = p->dport;
	key->proto = p->proto;
	key->kind = kind;
}

/* lb_find says what the packet in scratch is to services; outside: it came from another machine. */
__noinline int lb_find(__u32 outside)
{
	struct lb_scratch *l = lb_scratch_get();
	struct scratch *s = scratch_get();
	struct nat_key key = {};
	struct lb_entry *row;
	struct packet *p;

	if (!s || !l)
		return LB_NOTHING;
	p = &s->packet;
	l->kind = LB_NOTHING;
	if (p->translated || !lb_protocol(p->proto))
		return LB_NOTHING;
	if (!outside) {
		lb_key(&key, p, LB_REVERSE);
		row = bpf_map_lookup_elem(&lb, &key);
		if (row && (row->flags & LB_HAIRPIN)) {
			l->entry = *row;
			l->kind = LB_HAIRPIN_REPLY;
			return LB_HAIRPIN_REPLY;
		}
	}
	if (service_find(&p->dst, p->dport, p->proto, outside, &l->service))
		l->kind = LB_SERVICE;
	return l->kind;
}

#endif
