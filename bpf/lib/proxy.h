/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Handing packets to the node's proxy, which has sockets with any address. A packet for a socket gets MARK_PROXY, and
 * the node's rules send it to the local stack; one that begins a connection is given the slot's listener besides. */
#ifndef WEIR_PROXY_H
#define WEIR_PROXY_H

#include "ct.h"
#include "drop.h"
#include "nat.h"
#include "reset.h"

static __always_inline int proxy_take(struct __sk_buff *skb)
{
	skb->mark = (skb->mark & ~MARK_MASK) | MARK_PROXY;
	bpf_skb_change_type(skb, PACKET_HOST); /* by a tunnel it came as another host's */
	return TC_ACT_OK;
}

/* proxy_reason finds a socket for the packet in scratch, which goes forward in a connection with a slot, and assigns it
 * when that is needed: 0 or a drop reason. */
static __always_inline int proxy_reason(struct __sk_buff *skb, const struct packet *p, __u32 slot)
{
	int found;

	if (p->fragment)
		return DROP_PROXY_FRAGMENT;
	if (p->proto == IPPROTO_TCP) {
		if (proxy_connected(skb))
			return 0;
		if (!p->starts)
			return DROP_NO_LISTENER;
	} else if (p->proto != IPPROTO_UDP) {
		return DROP_PROXY_PROTOCOL;
	}
	found = proxy_listener(skb, slot, 1);
	return !found ? 0 : found == LISTENER_NONE ? DROP_NO_LISTENER : DROP_PROXY_ASSIGN;
}

/* proxy_redirect brings the packet in scratch, which ct has put forward on a slot, to the proxy, and nowhere else: a
 * verdict. */
__noinline int proxy_redirect(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();
	struct decision *v;
	struct packet *p;
	struct pass *o;
	int reason;

	if (!s)
		return TC_ACT_SHOT;
	p = &s->packet;
	o = &s->pass;
	v = &s->decision;
	reason = proxy_reason(skb, p, v->slot);
	if (!reason)
		return proxy_take(skb);
	o->rule = v->rule;
	o->verdict = v->verdict;
	o->policy_direction = v->policy_direction;
	if (reason != DROP_NO_LISTENER)
		return drop(skb, reason);
	metric_add(p->starts || p->proto == IPPROTO_UDP ? METRIC_PROXY_NO_LISTENER : METRIC_PROXY_LOST, 1, p->bytes);
	if (!v->closed) /* else it is what was still under way */
		drop(skb, reason);
	return p->starts ? TC_ACT_SHOT : reset_sender(skb);
}

/* proxy_on_slot says, after ct_update, whether the packet in scratch goes to the proxy. */
static __always_inline bool proxy_on_slot(const struct scratch *s)
{
	return s->decision.slot && !s->decision.d;
}

/* proxy_past says, after ct_update, whether the packet in scratch answers a connection with a slot, though only the
 * proxy may. */
static __always_inline bool proxy_past(const struct scratch *s)
{
	return s->decision.slot && s->decision.d;
}

static __always_inline bool upstream_port(__be16 port)
{
	__u16 n = bpf_ntohs(port);

	return n >= UPSTREAM_PORT_MIN && n <= UPSTREAM_PORT_MAX;
}

/* upstream_udp: a socket that is bound to the packet's destination, address and port. */
static __always_inline bool upstream_udp(struct __sk_buff *skb, const struct packet *p, struct bpf_sock_tuple *t,
					 __u32 size)
{
	struct bpf_sock *sk = bpf_sk_lookup_udp(skb, t, size, BPF_F_CURRENT_NETNS, 0);
	struct addr bound;

	if (!sk)
		return false;
	if (p->v4)
		addr_from_v4(&bound, sk->src_ip4);
	else
		addr_from_words(&bound, sk->src_ip6);
	bpf_sk_release(sk);
	return addr_equal(&bound, &p->dst);
}

/* proxy_answers: the packet in scratch, or the one that an ICMP error in scratch is about, is of a connection of an
 * upstream socket of the proxy, or of one that the proxy has accepted when it is an error. */
__noinline int proxy_answers(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();
	struct bpf_sock_tuple t = {};
	struct packet *p;
	__u32 size;
	bool found;

	if (!s)
		return 0;
	p = &s->packet;
	if (p->icmp_error) {
		struct inner in = {};

		if (!inner_read(skb, p, &in) || in.proto != IPPROTO_TCP)
			return 0;
		size = tuple_make(&t, &in.dst, &in.src, in.dport, in.sport, p->v4);
		found = tuple_connected(skb, &t, size);
	} else {
		if (!upstream_port(p->dport) || p->starts)
			return 0;
		size = tuple_make(&t, &p->src, &p->dst, p->sport, p->dport, p->v4);
		if (p->proto == IPPROTO_TCP)
			found = tuple_connected(skb, &t, size);
		else
			found = p->proto == IPPROTO_UDP && upstream_udp(skb, p, &t, size);
	}
	if (found)
		metric_add(METRIC_PROXY_UPSTREAM, p->segments, p->bytes);
	return found;
}

/* proxy_lost drops what a pod answers to an upstream socket that is no more: the pod that the proxy spoke for never
 * had the connection. */
static __always_inline int proxy_lost(struct __sk_buff *skb, const struct packet *p, bool closed)
{
	metric_add(METRIC_PROXY_LOST, 1, p->bytes);
	if (!closed)
		drop(skb, DROP_NO_LISTENER);
	return reset_sender(skb);
}

/* proxy_moved tells of a packet whose connection has changed its slot, and resets both ends: 0 when the packet, a reset
 * now, goes on. */
static __always_inline int proxy_moved(struct __sk_buff *skb, const struct packet *p)
{
	metric_add(METRIC_PROXY_MOVED, 1, p->bytes);
	drop(skb, DROP_SLOT_CHANGED);
	return reset_both(skb);
}

/* proxy_spoke counts what an accepted socket of the proxy sends in the name of a local endpoint, which scratch holds,
 * where the endpoint's connection is counted: 0 or a drop reason. It makes no entry. */
__noinline int proxy_spoke(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();
	struct endpoint *src, *dst;
	struct ct_key key = {};
	struct ct_entry *entry;
	struct packet *p;
	struct pass *o;
	int reason;

	if (!s)
		return 0;
	p = &s->packet;
	o = &s->pass;
	src = endpoint_find(&p->src);
	if (!src || p->kind)
		return 0;
	key.endpoint = src->id;
	key.proto = p->proto;
	ct_key_make(&key, &p->src, &p->dst, p->sport, p->dport);
	entry = bpf_map_lookup_elem(&ct, &key);
	if (!entry || !SLOT_OF(entry->conn.rule) || entry->conn.tail != ct_tail(&key) || p->now > entry->conn.expires)
		return 0;
	__builtin_memset(o, 0, sizeof(*o));
	o->sent = 1;
	o->self_identity = src->identity;
	o->ifindex = src->ifindex;
	o->endpoint = src->id;
	dst = endpoint_find(&p->dst);
	if (dst) {
		o->local_peer = 1;
		o->peer_identity = dst->identity;
		o->peer = endpoint_peer(dst);
	}
	reason = ct_update(skb);
	return reason > 0 ? reason : 0;
}

/* proxy_outbound is proxy_spoke for a packet that leaves the node and whose L3 header is in scratch; fault is what that
 * gave. */
static __always_inline int proxy_outbound(struct __sk_buff *skb, struct scratch *s, int fault)
{
	struct packet *p = &s->packet;

	if (fault || (p->fragment != FRAGMENT_LATER && packet_l4(skb)) || (p->fragment && frags_resolve()))
		return 0;
	return proxy_spoke(skb);
}

#endif
