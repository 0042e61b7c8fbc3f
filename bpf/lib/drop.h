/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Dropping: every dropped packet has a row that counts it and a record, or a count that the record was lost. */
#ifndef WEIR_DROP_H
#define WEIR_DROP_H

#include "events.h"
#include "identity.h"
#include "scratch.h"

static __always_inline bool drop_add(struct drop_key *key, struct packet *p)
{
	struct drop_value zero = {}, *v = bpf_map_lookup_elem(&drops, key);

	if (!v) {
		bpf_map_update_elem(&drops, key, &zero, BPF_NOEXIST);
		v = bpf_map_lookup_elem(&drops, key);
		if (!v)
			return false;
	}
	__sync_fetch_and_add(&v->records, 1);
	__sync_fetch_and_add(&v->packets, p->segments);
	__sync_fetch_and_add(&v->bytes, p->bytes);
	return true;
}

/* drop counts and reports the packet in scratch at its observation point, and returns the verdict. */
__noinline int drop(struct __sk_buff *skb, __u32 reason)
{
	struct scratch *s = scratch_get();
	struct drop_key key = {};
	struct packet *p;
	struct pass *o;
	struct record *r;
	bool has_ports, by_policy;

	if (!s)
		return TC_ACT_SHOT;
	p = &s->packet;
	o = &s->pass;
	if (!o->peer_identity) {
		const struct addr *peer = o->sent ? &p->dst : &p->src;

		o->peer_identity = addr_is_zero(peer) ? 0 : identity_find(peer);
		if (!o->sent && p->tunnel_identity)
			o->peer_identity = p->tunnel_identity;
	}
	has_ports = p->proto != IPPROTO_ICMP && p->proto != IPPROTO_ICMPV6;
	key.peer_identity = o->peer_identity;
	key.endpoint = o->endpoint;
	key.port = has_ports ? p->dport : 0;
	/* What the proxy does not get is dropped by the rule that sends it there. */
	by_policy = reason == DROP_POLICY || reason == DROP_POLICY_DENY ||
		    (o->policy_direction && (reason == DROP_NO_LISTENER || reason == DROP_SLOT_CHANGED ||
					     reason == DROP_PROXY_FRAGMENT || reason == DROP_PROXY_PROTOCOL));
	key.direction = o->sent ? DIRECTION_EGRESS : DIRECTION_INGRESS;
	if (by_policy) {
		/* A packet of a cut connection, either way: the policy's direction, and its rule. */
		key.direction = o->policy_direction;
		key.rule = RULE_OF(o->rule);
	}
	key.proto = p->proto;
	key.reason = reason;
	if (!drop_add(&key, p)) {
		/* The map is full: one row takes what has no row of its own. */
		key.port = 0;
		key.peer_identity = 0;
		key.proto = 0;
		key.rule = 0;
		if (!drop_add(&key, p))
			metric_add(METRIC_DROPS_OVERFLOW, 1, p->bytes);
	}

	r = &s->record;
	__builtin_memset(r, 0, sizeof(*r));
	r->type = RECORD_DROP;
	r->time = p->now;
	r->src = p->src;
	r->dst = p->dst;
	if (has_ports) {
		r->sport = bpf_ntohs(p->sport);
		r->dport = bpf_ntohs(p->dport);
	}
	r->endpoint = o->endpoint;
	r->src_identity = o->sent ? o->self_identity : o->peer_identity;
	r->dst_identity = o->sent ? o->peer_identity : o->self_identity;
	r->direction = key.direction;
	r->reason = reason;
	r->ifindex = skb->ifindex;
	r->length = p->length;
	r->proto = p->proto;
	r->tcp_flags = p->tcp_flags;
	r->icmp_type = p->icmp_type;
	r->icmp_code = p->icmp_code;
	r->service = p->service;
	r->rule = by_policy ? RULE_OF(o->rule) : 0;
	r->slot = SLOT_OF(o->rule);
	r->flags = p->fragment ? RECORD_FRAGMENT : 0;
	if (by_policy) {
		r->verdict = o->verdict;
		if (!!o->sent == (key.direction == DIRECTION_INGRESS))
			r->flags |= RECORD_IS_REPLY;
	}
	r->ip_version = skb->protocol == bpf_htons(ETH_P_IP) ? 4 : skb->protocol == bpf_htons(ETH_P_IPV6) ? 6 : 0;
	r->forward.packets = p->segments;
	r->forward.bytes = p->bytes;
	r->forward.first = r->forward.last = p->now;
	bpf_skb_load_bytes(skb, 0, r->dst_mac, 6);
	bpf_skb_load_bytes(skb, 6, r->src_mac, 6);
	events_write(r);
	return TC_ACT_SHOT;
}

#endif
