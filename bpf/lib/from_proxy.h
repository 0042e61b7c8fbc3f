/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What the proxy's upstream sockets send in a pod's name. Their mark says which stage they have passed; here is the
 * next one. They are not tracked at the endpoint that they hide behind. */
#ifndef WEIR_FROM_PROXY_H
#define WEIR_FROM_PROXY_H

#include "overlay.h"

static __always_inline bool upstream_mark(__u32 mark)
{
	mark &= MARK_MASK;
	return mark == MARK_ROUTE_PASSED || mark == MARK_EGRESS_PASSED || mark == MARK_INGRESS_PASSED;
}

/* upstream_pass makes the endpoint that a socket speaks for the observation point. */
static __always_inline void upstream_pass(struct __sk_buff *skb, struct pass *o, const struct endpoint *src)
{
	__builtin_memset(o, 0, sizeof(*o));
	o->sent = 1;
	o->from_host = 1;
	o->ifindex = skb->ifindex;
	if (src) {
		o->self_identity = src->identity;
		o->endpoint = src->id;
	}
}

#define UPSTREAM_GOES_ON -1

/* upstream_delivered says whether the connection of the packet in scratch has got as far as to its server: the sockets
 * that the client's and the server's rules lead to would have the same tuple. */
static __always_inline bool upstream_delivered(const struct packet *p, const struct endpoint *dst)
{
	struct ct_key key = {.endpoint = dst->id, .proto = p->proto, .kind = p->kind};
	struct ct_entry *entry;

	if (p->starts)
		return false;
	ct_key_make(&key, &p->src, &p->dst, p->sport, p->dport);
	entry = bpf_map_lookup_elem(&ct, &key);
	return entry && entry->conn.tail == ct_tail(&key) && p->now <= entry->conn.expires;
}

/* upstream_egress asks the client's egress policy, after a service's route, for each packet: UPSTREAM_GOES_ON or a
 * verdict. */
__noinline int upstream_egress(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();
	struct endpoint *dst;
	struct packet *p;
	struct pass *o;
	bool goes_on;
	__u32 slot;
	int reason;

	if (!s)
		return TC_ACT_SHOT;
	p = &s->packet;
	o = &s->pass;
	dst = endpoint_find(&p->dst);
	if (dst) {
		o->local_peer = 1;
		o->peer_identity = dst->identity;
		o->peer = endpoint_peer(dst);
		o->hairpin = dst->id == o->endpoint;
		o->point = POINT_FROM_ENDPOINT;
	} else {
		peer_resolve(o, p, 0);
	}
	reason = policy_pass(DIRECTION_EGRESS, bpf_ntohs(p->dport));
	if (p->starts || p->proto == IPPROTO_UDP)
		policy_report(skb, 0);
	if (reason)
		return drop(skb, reason);
	slot = SLOT_OF(o->rule);
	goes_on = dst && upstream_delivered(p, dst);
	if (!goes_on && p->proto == IPPROTO_TCP && proxy_connected(skb))
		return proxy_take(skb);
	if (!slot)
		return UPSTREAM_GOES_ON;
	if (o->verdict == POLICY_VISIBLE && (!p->starts || proxy_listener(skb, slot, 0))) {
		metric_add(METRIC_PROXY_NOT_SEEN, p->starts, 0);
		return UPSTREAM_GOES_ON;
	}
	if (goes_on) {
		metric_add(METRIC_PROXY_MOVED, 1, p->bytes);
		drop(skb, DROP_SLOT_CHANGED);
		return reset_sender(skb);
	}
	s->decision.slot = slot;
	s->decision.rule = o->rule;
	s->decision.verdict = o->verdict;
	s->decision.policy_direction = o->policy_direction;
	s->decision.closed = 0;
	return proxy_redirect(skb);
}

/* upstream_claim keeps a masqueraded connection in `lb`, which is swept: its claim is given back then. */
static __always_inline int upstream_claim(struct packet *p)
{
	struct lb_entry *row, fresh = {.addr = p->dst, .port = p->dport};
	struct nat_key key = {};

	lb_key(&key, p, LB_FORWARD);
	row = bpf_map_lookup_elem(&lb, &key);
	if (row) {
		lb_touch(row, p);
		return 0;
	}
	lb_touch(&fresh, p);
	return bpf_map_update_elem(&lb, &key, &fresh, BPF_ANY) ? DROP_CT_FULL : 0;
}

/* upstream_send sends the packet in scratch to somebody who is no endpoint of this node: a verdict. */
__noinline int upstream_send(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();
	struct pass *o;
	int reason;

	if (!s)
		return TC_ACT_SHOT;
	o = &s->pass;
	o->local_peer = 0;
	reason = ct_classify();
	if (reason)
		return drop(skb, reason);
	if (o->point == POINT_TO_OVERLAY) {
		reason = overlay_send(skb);
		return reason == TC_ACT_REDIRECT ? reason : drop(skb, reason);
	}
	skb->mark &= ~MARK_MASK;
	if (o->point == POINT_TO_HOST && host_enforced()) {
		reason = host_check(skb, 0, 0, 0);
		return reason ? drop(skb, reason) : TC_ACT_OK;
	}
	if (o->masquerade) {
		reason = upstream_claim(&s->packet);
		if (reason)
			return drop(skb, reason);
		skb->mark |= MARK_MASQUERADE;
	}
	return TC_ACT_OK;
}

/* from_proxy decides what becomes of an upstream socket's packet, whose L3 header is in scratch. */
static __always_inline int from_proxy(struct __sk_buff *skb, struct scratch *s, int fault)
{
	__u32 stage = skb->mark & MARK_MASK;
	struct packet *p = &s->packet;
	struct endpoint *src, *dst;
	int verdict;

	if (!fault && p->fragment != FRAGMENT_LATER)
		fault = packet_l4(skb);
	if (!fault && p->fragment)
		fault = frags_resolve();
	src = endpoint_find(&p->src);
	dst = endpoint_find(&p->dst);
	upstream_pass(skb, &s->pass, src);
	if (!fault && stage == MARK_INGRESS_PASSED && !dst)
		fault = DROP_UNROUTABLE; /* it was here when the connection began */
	if (!fault && stage != MARK_INGRESS_PASSED && !src)
		fault = DROP_INVALID_SOURCE_IP;
	if (fault)
		return drop(skb, fault);
	if (stage == MARK_ROUTE_PASSED) {
		verdict = upstream_egress(skb);
		if (verdict != UPSTREAM_GOES_ON)
			return verdict;
	}
	if (!dst)
		return upstream_send(skb);
	return deliver(skb, s, dst, src, DELIVER_UPSTREAM | (stage == MARK_INGRESS_PASSED ? DELIVER_UNASKED : 0));
}

#endif
