/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The proxy's sockets in the node's network namespace: who gets a packet there, and whether a connection may begin on a
 * slot. */
#ifndef WEIR_PROXY_SOCKET_H
#define WEIR_PROXY_SOCKET_H

#include "lb_state.h"
#include "policy.h"
#include "scratch.h"

#define UPSTREAM_PORT_MIN 52000
#define UPSTREAM_PORT_MAX 60999

#define LOCALHOST_V4 bpf_htonl(0x7f000001)

/* tuple_make fills in a socket's tuple as a packet from src to dst has it; it returns the size. */
static __always_inline __u32 tuple_make(struct bpf_sock_tuple *t, const struct addr *src, const struct addr *dst,
					__be16 sport, __be16 dport, bool v4)
{
	if (v4) {
		t->ipv4.saddr = addr_v4(src);
		t->ipv4.daddr = addr_v4(dst);
		t->ipv4.sport = sport;
		t->ipv4.dport = dport;
		return sizeof(t->ipv4);
	}
	__builtin_memcpy(t->ipv6.saddr, src, sizeof(*src));
	__builtin_memcpy(t->ipv6.daddr, dst, sizeof(*dst));
	t->ipv6.sport = sport;
	t->ipv6.dport = dport;
	return sizeof(t->ipv6);
}

/* tuple_connected says whether TCP has a socket of this very connection, in any state: one in TIME_WAIT takes even a
 * SYN, or a port that is used again would time out. */
static __always_inline bool tuple_connected(struct __sk_buff *skb, struct bpf_sock_tuple *t, __u32 size)
{
	struct bpf_sock *sk = bpf_skc_lookup_tcp(skb, t, size, BPF_F_CURRENT_NETNS, 0);
	__u32 state;

	if (!sk)
		return false;
	state = sk->state;
	bpf_sk_release(sk);
	return state != TCP_LISTEN;
}

/* proxy_connected: the packet in scratch is of a connection that a TCP socket of this namespace has. */
__noinline int proxy_connected(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();
	struct bpf_sock_tuple t = {};
	struct packet *p;
	__u32 size;

	if (!s)
		return 0;
	p = &s->packet;
	size = tuple_make(&t, &p->src, &p->dst, p->sport, p->dport, p->v4);
	return tuple_connected(skb, &t, size);
}

/* proxy_speaks: a TCP socket of this namespace has sent the packet in scratch. */
__noinline int proxy_speaks(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();
	struct bpf_sock_tuple t = {};
	struct packet *p;
	__u32 size;

	if (!s)
		return 0;
	p = &s->packet;
	size = tuple_make(&t, &p->dst, &p->src, p->dport, p->sport, p->v4);
	return tuple_connected(skb, &t, size);
}

#define LISTENER_NONE	-1
#define LISTENER_FAILED -2 /* the kernel would not assign it */

/* proxy_listener finds the slot's listener, and gives it the packet in scratch when that is to be assigned: 0, or one
 * of the above. */
__noinline int proxy_listener(struct __sk_buff *skb, __u32 slot, __u32 assign)
{
	struct scratch *s = scratch_get();
	struct bpf_sock_tuple t = {};
	struct addr home = {};
	struct bpf_sock *sk;
	__u32 size, *port;
	struct packet *p;
	int result = 0;

	if (!s)
		return LISTENER_NONE;
	p = &s->packet;
	port = bpf_map_lookup_elem(&slots, &slot);
	if (!port || !*port)
		return LISTENER_NONE;
	if (p->v4)
		addr_from_v4(&home, LOCALHOST_V4);
	else
		home.lo = (__u64)bpf_htonl(1) << 32;
	size = tuple_make(&t, &p->src, &home, p->sport, bpf_htons(*port), p->v4);
	if (p->proto == IPPROTO_TCP)
		sk = bpf_sk_lookup_tcp(skb, &t, size, BPF_F_CURRENT_NETNS, 0);
	else
		sk = bpf_sk_lookup_udp(skb, &t, size, BPF_F_CURRENT_NETNS, 0);
	if (!sk)
		return LISTENER_NONE;
	if (p->proto == IPPROTO_TCP && sk->state != TCP_LISTEN)
		result = LISTENER_NONE;
	else if (assign && bpf_sk_assign(skb, sk, 0))
		result = LISTENER_FAILED;
	bpf_sk_release(sk);
	return result;
}

/* proxy_route is the slot of the route of the service in scratch; 0 = none. */
static __always_inline __u32 proxy_route(void)
{
	struct lb_scratch *l = lb_scratch_get();

	return l && l->kind == LB_SERVICE ? l->service.kind >> 16 : 0;
}

/* proxy_routed says whether the pod's packet in scratch, which has no entry and goes to the service in scratch, goes to
 * the service's route: unless it belongs to a connection from before there was one. */
static __always_inline bool proxy_routed(void)
{
	struct scratch *s = scratch_get();
	struct nat_key key = {};

	if (!s || !proxy_route() || s->packet.proto != IPPROTO_TCP)
		return false;
	if (s->packet.starts)
		return true;
	lb_key(&key, &s->packet, LB_FORWARD);
	return !bpf_map_lookup_elem(&lb, &key);
}

/* proxy_admit says whether the connection in scratch, which policy lets begin, can begin on its slot: 0 or a drop
 * reason. What is only to be seen goes straight on if it cannot. */
__noinline int proxy_admit(struct __sk_buff *skb, __u32 verdict)
{
	struct scratch *s = scratch_get();
	struct packet *p;
	struct pass *o;
	int reason = 0;

	if (!s)
		return DROP_INVALID_PACKET;
	p = &s->packet;
	o = &s->pass;
	if (!SLOT_OF(o->rule))
		return 0;
	if (o->endpoint == HOST_ENDPOINT || (p->proto != IPPROTO_TCP && p->proto != IPPROTO_UDP))
		reason = DROP_PROXY_PROTOCOL;
	else if (p->fragment)
		reason = DROP_PROXY_FRAGMENT;
	else if (p->proto == IPPROTO_TCP && proxy_connected(skb))
		return 0;
	else if ((p->proto == IPPROTO_TCP && !p->starts) || proxy_listener(skb, SLOT_OF(o->rule), 0))
		reason = DROP_NO_LISTENER;
	if (!reason)
		return 0;
	if (verdict == POLICY_VISIBLE) {
		metric_add(METRIC_PROXY_NOT_SEEN, 1, p->bytes);
		o->verdict = POLICY_ALLOW;
		o->rule = RULE_OF(o->rule);
		return 0;
	}
	if (reason == DROP_NO_LISTENER)
		metric_add(p->proto == IPPROTO_TCP && !p->starts ? METRIC_PROXY_LOST : METRIC_PROXY_NO_LISTENER, 1,
			   p->bytes);
	return reason;
}

#endif
