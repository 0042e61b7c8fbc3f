/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Fragments: only the first has ports; the later ones are found by it. */
#ifndef WEIR_FRAGS_H
#define WEIR_FRAGS_H

#include "scratch.h"

struct frag_key {
	struct addr src;
	struct addr dst;
	__u32 id; /* as in the packet */
	__u8 proto;
	__u8 pad[3];
};

struct frag {
	__be16 sport; /* as in struct packet */
	__be16 dport;
	__u8 kind;
	__u8 icmp_type;
	__u8 icmp_code;
	__u8 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192); /* sized */
	__type(key, struct frag_key);
	__type(value, struct frag);
} frags SEC(".maps"); /* written and read: tc programs */

/* frags_resolve gives a later fragment the ports of its first one. */
__noinline int frags_resolve(void)
{
	struct scratch *s = scratch_get();
	struct frag_key key = {};
	struct frag *found;
	struct packet *p;

	if (!s)
		return DROP_INVALID_PACKET;
	p = &s->packet;
	key.src = p->src;
	key.dst = p->dst;
	key.id = p->fragment_id;
	key.proto = p->proto;
	if (p->fragment == FRAGMENT_FIRST) {
		struct frag frag = {.sport = p->sport,
				    .dport = p->dport,
				    .kind = p->kind,
				    .icmp_type = p->icmp_type,
				    .icmp_code = p->icmp_code};

		bpf_map_update_elem(&frags, &key, &frag, BPF_ANY);
		return 0;
	}
	found = bpf_map_lookup_elem(&frags, &key);
	if (!found)
		return DROP_UNKNOWN_FRAGMENT;
	p->sport = found->sport;
	p->dport = found->dport;
	p->kind = found->kind;
	p->icmp_type = found->icmp_type;
	p->icmp_code = found->icmp_code;
	return 0;
}

#endif
