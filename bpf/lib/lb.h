/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Translating packets that go to a service, and the answers to them. */
#ifndef WEIR_LB_H
#define WEIR_LB_H

#include "ct.h"
#include "lb_state.h"
#include "nat.h"

static __always_inline __u32 lb_mix(__u32 h, __u32 v)
{
	h ^= v;
	h *= 0x85ebca6b;
	h ^= h >> 13;
	return h * 0xc2b2ae35;
}

/* lb_hash is of the connection, but for the address that the client used: it may be any node's. Not 0. */
static __always_inline __u32 lb_hash(const struct packet *p)
{
	__u32 h = lb_mix(0x9747b28c, (__u32)p->src.hi);

	h = lb_mix(h, p->src.hi >> 32);
	h = lb_mix(h, (__u32)p->src.lo);
	h = lb_mix(h, p->src.lo >> 32);
	h = lb_mix(h, (__u32)p->sport << 16 | p->dport);
	h = lb_mix(h, p->proto);
	h ^= h >> 16;
	return h ?: 1;
}

/* sctp_closes: ABORT, SHUTDOWN, SHUTDOWN ACK, SHUTDOWN COMPLETE. */
static __always_inline bool sctp_closes(__u8 chunk)
{
	return chunk == 6 || chunk == 7 || chunk == 8 || chunk == 14;
}

/* lb_touch prolongs a row's life by a packet of its connection. */
static __always_inline void lb_touch(struct lb_entry *row, const struct packet *p)
{
	__u64 expires;

	if (p->starts)
		row->flags &= ~LB_CLOSING;
	else if ((p->tcp_flags & (TCP_FIN | TCP_RST)) || (p->proto == IPPROTO_SCTP && sctp_closes(p->chunk)))
		row->flags |= LB_CLOSING;
	if (row->flags & LB_CLOSING)
		expires = cfg_tcp_closing;
	else if (p->proto == IPPROTO_UDP)
		expires = cfg_udp_answered;
	else
		expires = p->starts ? cfg_tcp_handshake : cfg_tcp_established;
	expires += p->now;
	/* Not at every packet: the row is other CPUs' too. */
	if (expires - row->expires > 1000000000)
		row->expires = expires;
}

/* lb_keeps says whether the packet stays with the backend of its row. */
static __always_inline bool lb_keeps(struct lb_entry *row, const struct service *svc, const struct packet *p,
				     bool outside)
{
	if (p->now > row->expires || (p->starts && (row->flags & LB_CLOSING)))
		return false;
	if (row->set == svc->set)
		return true;
	if (p->proto == IPPROTO_UDP) {
		if (!service_member(svc, &row->addr, row->port))
			return false;
	} else if (!p->starts) {
		return true; /* a backend that is no more resets it */
	} else if (!service_eligible(svc, &row->addr, row->port, outside)) {
		return false;
	}
	row->set = svc->set;
	return true;
}

/* lb_displace takes the row of another address of the backend's away, which the client's port asked before: answers
 * have one row, which is of the last asker, and a question that kept its own row would be answered from the other
 * address. */
static __always_inline void lb_displace(const struct nat_key *key, const struct nat_key *back)
{
	struct lb_entry *other = bpf_map_lookup_elem(&lb, back);
	struct nat_key before = *key;

	if (!other || (other->port == key->dport && addr_equal(&other->addr, &key->dst)))
		return;
	before.dst = other->addr;
	before.dport = other->port;
	bpf_map_delete_elem(&lb, &before);
}

/* lb_choose leaves the connection of the packet in scratch to the service in scratch there: 0 or a drop reason. */
__noinline int lb_choose(__u32 outside)
{
	struct lb_scratch *l = lb_scratch_get();
	struct scratch *s = scratch_get();
	struct nat_key key = {}, back = {};
	struct lb_entry *row, reverse = {};
	int i, reason = DROP_NO_BACKEND;
	struct choice got = {};
	struct packet *p;

	if (!s || !l)
		return DROP_NO_BACKEND;
	p = &s->packet;
	lb_key(&key, p, LB_FORWARD);
	row = bpf_map_lookup_elem(&lb, &key);
	if (row && lb_keeps(row, &l->service, p, outside)) {
		lb_touch(row, p);
		l->entry = *row;
		return 0;
	}
#pragma clang loop unroll(disable)
	for (i = 0; i < SERVICE_TRIES; i++) {
		reason = service_select(&l->service, &p->src, outside, lb_hash(p), &got);
		if (reason != SERVICE_STALE || !service_find(&p->dst, p->dport, p->proto, outside, &l->service))
			break;
	}
	if (reason) {
		if (!l->service.total)
			p->translated = TRANSLATED_REFUSED; /* nobody anywhere: worth an answer */
		return reason == SERVICE_STALE ? DROP_NO_BACKEND : reason;
	}
	back.dport = p->sport;
	back.proto = p->proto;
	back.kind = LB_REVERSE;
	if (row) {
		back.src = row->addr;
		back.sport = row->port;
		back.dst = row->flags & LB_HAIRPIN ? p->dst : p->src;
		bpf_map_delete_elem(&lb, &back);
	}
	__builtin_memset(&l->entry, 0, sizeof(l->entry));
	l->entry.addr = got.addr;
	l->entry.port = got.port;
	l->entry.service = l->service.id;
	l->entry.set = l->service.set;
	if (addr_equal(&got.addr, &p->src))
		l->entry.flags = LB_HAIRPIN;
	lb_touch(&l->entry, p);
	back.src = got.addr;
	back.sport = got.port;
	back.dst = l->entry.flags & LB_HAIRPIN ? p->dst : p->src;
	if (p->proto == IPPROTO_UDP)
		lb_displace(&key, &back);
	reverse = l->entry;
	reverse.addr = p->dst;
	reverse.port = p->dport;
	if (bpf_map_update_elem(&lb, &back, &reverse, BPF_ANY) || bpf_map_update_elem(&lb, &key, &l->entry, BPF_ANY))
		return DROP_CT_FULL;
	return 0;
}

/* lb_apply sends the packet in scratch to the backend in scratch. */
__noinline int lb_apply(struct __sk_buff *skb)
{
	struct lb_scratch *l = lb_scratch_get();
	struct scratch *s = scratch_get();
	struct addr to, seen;
	struct packet *p;
	int reason;

	if (!s || !l)
		return DROP_NO_BACKEND;
	p = &s->packet;
	seen = p->dst;
	to = l->entry.addr;
	reason = nat_port(skb, p, false, l->entry.port);
	if (!reason)
		reason = nat_address(skb, p, false, &to);
	if (!reason && (l->entry.flags & LB_HAIRPIN))
		reason = nat_address(skb, p, true, &seen);
	p->translated = TRANSLATED_FORWARD;
	p->service = l->entry.service;
	return reason;
}

/* lb_moved: a connected UDP socket was translated once and for all, so that what it sends to a backend that its service
 * has no more is translated here, as if it went to the service. It returns 0, a drop reason, or LB_SERVICE when the
 * backend of its connection is in scratch. */
__noinline int lb_moved(struct __sk_buff *skb)
{
	struct lb_scratch *l = lb_scratch_get();
	struct scratch *s = scratch_get();
	struct sock_choice *choice;
	struct bpf_sock *sk = skb->sk;
	struct packet *p;

	if (!s || !l || !sk)
		return LB_NOTHING;
	p = &s->packet;
	sk = bpf_sk_fullsock(sk);
	if (!sk)
		return LB_NOTHING;
	choice = bpf_sk_storage_get(&choices, sk, NULL, 0);
	if (!choice || !choice->connected || choice->backend_port != p->dport || !addr_equal(&choice->backend, &p->dst))
		return LB_NOTHING;
	if (!service_find(&choice->vip, choice->vip_port, IPPROTO_UDP, false, &l->service) ||
	    l->service.set == choice->set)
		return LB_NOTHING;
	if (service_member(&l->service, &choice->backend, choice->backend_port)) {
		choice->set = l->service.set;
		return LB_NOTHING;
	}
	l->kind = LB_SERVICE;
	return LB_SERVICE;
}

#define LB_TRANSLATED -1

/* lb_reverse gives the answer in scratch the address that the client knows: LB_TRANSLATED, 0 when it is no answer to a
 * translated packet, or a drop reason. */
__noinline int lb_reverse(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();
	struct nat_key key = {};
	struct lb_entry *row;
	struct addr seen;
	struct packet *p;
	__be16 port;
	int reason;

	if (!s)
		return 0;
	p = &s->packet;
	lb_key(&key, p, LB_REVERSE);
	row = bpf_map_lookup_elem(&lb, &key);
	if (!row)
		return 0;
	lb_touch(row, p);
	seen = row->addr;
	port = row->port;
	p->service = row->service;
	reason = nat_port(skb, p, true, port);
	if (!reason)
		reason = nat_address(skb, p, true, &seen);
	return reason ?: LB_TRANSLATED;
}

/* lb_outbound translates what a pod sends, as lb_find has left it in scratch: 0, a drop reason, or LB_HAIRPIN_DONE when
 * the packet is to go back to the pod. A pod's connection to itself is tracked once, as one to the service. */
#define LB_HAIRPIN_DONE -2

__noinline int lb_outbound(struct __sk_buff *skb)
{
	struct lb_scratch *l = lb_scratch_get();
	struct scratch *s = scratch_get();
	struct packet *p;
	struct pass *o;
	int reason;

	if (!s || !l)
		return DROP_NO_BACKEND;
	p = &s->packet;
	o = &s->pass;
	if (l->kind == LB_HAIRPIN_REPLY) {
		struct addr pod = p->src, seen = l->entry.addr;

		reason = nat_port(skb, p, true, l->entry.port);
		if (!reason)
			reason = nat_address(skb, p, true, &seen);
		if (!reason)
			reason = nat_address(skb, p, false, &pod);
		if (reason)
			return reason;
		o->sent = 0;
		o->hairpin = o->local_peer = 1;
		o->peer_identity = o->self_identity;
		p->kind = KIND_HAIRPIN;
		p->service = l->entry.service;
		return ct_update(skb) ?: LB_HAIRPIN_DONE;
	}
	p->service = l->service.id;
	reason = lb_choose(0);
	if (reason)
		return reason;
	if (!(l->entry.flags & LB_HAIRPIN)) {
		o->translated = 1;
		return lb_apply(skb);
	}
	o->hairpin = o->local_peer = 1;
	o->peer_identity = o->self_identity;
	p->kind = KIND_HAIRPIN;
	reason = ct_update(skb);
	if (!reason)
		reason = lb_apply(skb);
	return reason ?: LB_HAIRPIN_DONE;
}

/* lb_reverse_error does the same for an ICMP error about a translated packet; the router or backend that sends it keeps
 * its address unless it is the backend. */
__noinline int lb_reverse_error(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();
	struct nat_key key = {.kind = LB_REVERSE};
	struct inner in = {};
	struct lb_entry *row;
	struct addr seen;
	struct packet *p;
	__be16 port;
	int reason;

	if (!s || !inner_read(skb, &s->packet, &in))
		return 0;
	p = &s->packet;
	key.src = in.dst;
	key.dst = in.src;
	key.sport = in.dport;
	key.dport = in.sport;
	key.proto = in.proto;
	row = bpf_map_lookup_elem(&lb, &key);
	if (!row)
		return 0;
	seen = row->addr;
	port = row->port;
	reason = inner_rewrite(skb, p, &in, false, &seen, port);
	if (!reason && addr_equal(&p->src, &in.dst))
		reason = nat_address(skb, p, true, &seen);
	return reason ?: LB_TRANSLATED;
}

/* lb_forward_error sends an ICMP error of a client, about an answer, to the backend that sent the answer. */
__noinline int lb_forward_error(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();
	struct nat_key key = {.kind = LB_FORWARD};
	struct inner in = {};
	struct lb_entry *row;
	struct addr backend;
	struct packet *p;
	__be16 port;
	int reason;

	if (!s || !inner_read(skb, &s->packet, &in))
		return 0;
	p = &s->packet;
	key.src = in.dst;
	key.dst = in.src;
	key.sport = in.dport;
	key.dport = in.sport;
	key.proto = in.proto;
	row = bpf_map_lookup_elem(&lb, &key);
	if (!row || (row->flags & LB_HAIRPIN))
		return 0;
	backend = row->addr;
	port = row->port;
	reason = inner_rewrite(skb, p, &in, true, &backend, port);
	if (!reason)
		reason = nat_address(skb, p, false, &backend);
	p->translated = TRANSLATED_FORWARD;
	return reason ?: LB_TRANSLATED;
}

/* lb_inbound translates what came from another machine: LB_TRANSLATED, 0 when it goes to no service, or a drop reason.
 */
__noinline int lb_inbound(struct __sk_buff *skb)
{
	struct lb_scratch *l = lb_scratch_get();
	struct scratch *s = scratch_get();
	int reason;

	if (!s || !l)
		return 0;
	if (s->packet.icmp_error)
		return lb_forward_error(skb);
	if (lb_find(1) != LB_SERVICE)
		return 0;
	s->packet.service = l->service.id;
	reason = lb_choose(1);
	if (!reason)
		reason = lb_apply(skb);
	return reason ?: LB_TRANSLATED;
}

/* lb_answer is lb_reverse for packets of any kind, where ct says that the connection was translated. */
static __always_inline int lb_answer(struct __sk_buff *skb, const struct packet *p)
{
	return p->icmp_error ? lb_reverse_error(skb) : lb_reverse(skb);
}

/* lb_is_answer says, after ct_update, whether the packet answers one that was translated at this observation point. */
static __always_inline bool lb_is_answer(const struct scratch *s)
{
	if (s->packet.icmp_error)
		return true; /* they are few: looked up */
	return (s->decision.flags & CT_TRANSLATED) && s->decision.d;
}

/* lb_hop takes one from the TTL: the packet is routed here, round the kernel's forwarding. */
static __always_inline int lb_hop(struct __sk_buff *skb, const struct packet *p)
{
	__u8 ttl = p->ttl - 1;

	if (p->ttl <= 1)
		return DROP_TTL_EXCEEDED;
	if (p->v4) {
		__be16 was = bpf_htons((__u16)p->ttl << 8 | p->proto), is = bpf_htons((__u16)ttl << 8 | p->proto);

		if (bpf_l3_csum_replace(skb, ETH_HLEN + 10, was, is, 2) ||
		    bpf_skb_store_bytes(skb, ETH_HLEN + 8, &ttl, 1, 0))
			return DROP_WRITE_ERROR;
		return 0;
	}
	return bpf_skb_store_bytes(skb, ETH_HLEN + 7, &ttl, 1, 0) ? DROP_WRITE_ERROR : 0;
}

/* lb_send routes the packet in scratch: the kernel would not, since it has an address of this node as its source. It
 * returns a verdict, or minus a drop reason. */
__noinline int lb_send(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();
	struct bpf_redir_neigh hop = {};
	struct bpf_fib_lookup fib = {};
	struct packet *p;
	long found;
	int reason;

	if (!s)
		return -DROP_WRITE_ERROR;
	p = &s->packet;
	fib.ifindex = skb->ifindex;
	if (p->v4) {
		fib.family = AF_INET;
		fib.ipv4_src = addr_v4(&p->src);
		fib.ipv4_dst = addr_v4(&p->dst);
	} else {
		fib.family = AF_INET6;
		__builtin_memcpy(fib.ipv6_src, &p->src, sizeof(fib.ipv6_src));
		__builtin_memcpy(fib.ipv6_dst, &p->dst, sizeof(fib.ipv6_dst));
	}
	found = bpf_fib_lookup(skb, &fib, sizeof(fib), BPF_FIB_LOOKUP_SKIP_NEIGH);
	if (found == BPF_FIB_LKUP_RET_NOT_FWDED)
		return TC_ACT_OK; /* the node's own */
	if (found)
		return -DROP_NO_ROUTE;
	reason = lb_hop(skb, p);
	if (reason)
		return -reason;
	hop.nh_family = fib.family;
	if (fib.family == AF_INET)
		hop.ipv4_nh = fib.ipv4_dst;
	else
		__builtin_memcpy(hop.ipv6_nh, fib.ipv6_dst, sizeof(hop.ipv6_nh));
	skb->mark = (skb->mark & ~MARK_MASK) | MARK_DELIVERED;
	skb->cb[0] = fib.ifindex; /* seen by tests */
	return bpf_redirect_neigh(fib.ifindex, &hop, sizeof(hop), 0);
}

#endif
