/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Connection tracking. ct_update is the one function that counts a packet at an observation point. */
#ifndef WEIR_CT_H
#define WEIR_CT_H

#include "ct_earlier.h"
#include "ct_state.h"
#include "events.h"
#include "identity.h"
#include "policy.h"
#include "scratch.h"
#include "proxy_socket.h"

/* ct_emit completes the record in scratch, which holds a snapshot and its reason, and writes it. */
__noinline int ct_emit(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();
	struct packet *p;
	struct record *r;
	struct pass *o;
	__u8 flags = 0;

	if (!s)
		return 0;
	r = &s->record;
	p = &s->packet;
	o = &s->pass;
	r->time = p->now;
	r->type = RECORD_TRACE;
	r->src = p->src;
	r->dst = p->dst;
	r->xlated.hi = r->xlated.lo = 0;
	r->socket_cookie = r->cgroup_id = 0;
	r->xlated_port = 0;
	r->sport = bpf_ntohs(p->sport);
	r->dport = bpf_ntohs(p->dport);
	if (p->proto == IPPROTO_ICMP || p->proto == IPPROTO_ICMPV6)
		r->sport = r->dport = 0;
	r->endpoint = o->endpoint;
	if (o->sent) {
		r->src_identity = o->self_identity;
		r->dst_identity = o->peer_identity;
		if (r->direction == DIRECTION_INGRESS)
			flags = RECORD_IS_REPLY;
	} else {
		r->src_identity = o->peer_identity;
		r->dst_identity = o->self_identity;
		r->point = POINT_TO_ENDPOINT;
		if (r->direction == DIRECTION_EGRESS)
			flags = RECORD_IS_REPLY;
	}
	if (p->fragment)
		flags |= RECORD_FRAGMENT;
	if (r->reason == TRACE_ESTABLISHED && (flags & RECORD_IS_REPLY))
		r->reason = TRACE_REPLY;
	r->ifindex = o->ifindex;
	r->length = p->length;
	r->proto = p->proto;
	r->tcp_flags = p->tcp_flags;
	r->icmp_type = p->icmp_type;
	r->icmp_code = p->icmp_code;
	bpf_skb_load_bytes(skb, 0, r->dst_mac, sizeof(r->dst_mac));
	bpf_skb_load_bytes(skb, 6, r->src_mac, sizeof(r->src_mac));
	ct_flags_out(r, flags);
	events_write(r);
	return 0;
}

/* ct_classify decides where a packet goes that an endpoint sends to somebody else than a local endpoint; it returns 0
 * or a drop reason. */
__noinline int ct_classify(void)
{
	struct scratch *s = scratch_get();
	struct ipcache_entry *found;
	struct packet *p;
	struct pass *o;
	__u32 flags;

	if (!s)
		return DROP_INVALID_PACKET;
	p = &s->packet;
	o = &s->pass;
	found = ipcache_find(&p->dst);
	flags = found ? found->flags : 0;
	peer_resolve(o, p, 0);
	o->classified = 1;
	o->point = o->peer_identity == IDENTITY_HOST ? POINT_TO_HOST : POINT_TO_NETWORK;
	if (cfg_tunnel_ifindex && found && !addr_is_zero(&found->node) && !identity_is_outside(o->peer_identity))
		o->point = POINT_TO_OVERLAY;
	if (o->endpoint == HOST_ENDPOINT)
		return 0; /* the stack has routed it */
	if (flags & IPCACHE_LOCAL_PODS)
		return DROP_UNROUTABLE;
	/* A service's port is translated before it comes here. */
	if (flags & IPCACHE_SERVICES)
		return DROP_IS_CLUSTER_IP;
	o->masquerade = cfg_masquerade && identity_is_outside(o->peer_identity) && !(flags & IPCACHE_NO_MASQUERADE) &&
			(p->v4 ? cfg_node_v4.lo : cfg_node_v6.lo);
	return 0;
}

#define SVCCONN_UDP_AGE 10000000000ULL

/* ct_service finds the service that a connection began on, as the socket hooks noted it. A note of TCP is of this very
 * connection; one of UDP may be of an earlier socket of the port, so that it must be fresh. */
__noinline int ct_service(void)
{
	struct scratch *s = scratch_get();
	struct svcconn_key key = {};
	struct svcconn_note *note;
	struct packet *p;

	if (!s)
		return 0;
	p = &s->packet;
	key.local = p->src;
	key.remote = p->dst;
	key.local_port = p->sport;
	key.remote_port = p->dport;
	key.proto = p->proto;

	if (p->proto != IPPROTO_TCP && p->proto != IPPROTO_UDP)
		return 0;
	note = bpf_map_lookup_elem(&svcconn, &key);
	if (p->proto == IPPROTO_TCP)
		return note ? note->service : 0;
	if (note && p->now - note->time < SVCCONN_UDP_AGE)
		return note->service;
	key.local_port = 0;
	note = bpf_map_lookup_elem(&svcconn, &key);
	if (note && p->now - note->time < SVCCONN_UDP_AGE)
		return note->service;
	key.local.hi = key.local.lo = 0;
	note = bpf_map_lookup_elem(&svcconn, &key);
	if (note && p->now - note->time < SVCCONN_UDP_AGE)
		return note->service;
	return 0;
}

/* ct_related says whether an ICMP error is about a connection of the endpoint: its inner packet is one that the
 * connection had. */
__noinline int ct_related(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();
	struct ct_key key = {};
	struct ct_entry *entry;
	const struct packet *p;
	struct addr src, dst;
	__u32 offset;
	__be16 ports[4] = {};
	__u8 proto;

	if (!s)
		return 0;
	p = &s->packet;
	offset = p->l4 + 8;
	key.endpoint = s->pass.endpoint;
	if (p->v4) {
		struct iphdr ip;

		if (bpf_skb_load_bytes(skb, offset, &ip, sizeof(ip)))
			return 0;
		addr_from_v4(&src, ip.saddr);
		addr_from_v4(&dst, ip.daddr);
		proto = ip.protocol;
		offset += ip.ihl * 4;
	} else {
		struct ipv6hdr ip;

		if (bpf_skb_load_bytes(skb, offset, &ip, sizeof(ip)))
			return 0;
		src.hi = ip.saddr[0];
		src.lo = ip.saddr[1];
		dst.hi = ip.daddr[0];
		dst.lo = ip.daddr[1];
		proto = ip.nexthdr;
		offset += sizeof(ip);
	}
	if (bpf_skb_load_bytes(skb, offset, ports, sizeof(ports)))
		return 0;
	if (proto == IPPROTO_ICMP || proto == IPPROTO_ICMPV6) {
		__u8 type = *(__u8 *)ports;
		bool request = type == 8 || type == 128;

		ports[0] = request ? ports[2] : 0;
		ports[1] = request ? 0 : ports[2];
	}
	key.proto = proto;
	ct_key_make(&key, &src, &dst, ports[0], ports[1]);
	entry = bpf_map_lookup_elem(&ct, &key);
	/* A connection that policy has cut is none. */
	return entry && entry->conn.tail == ct_tail(&key) && entry->conn.state != CT_NONE &&
	       entry->conn.state != CT_DEAD && !ct_drops(&entry->conn);
}

/* ct_admit says whether the packet in scratch may begin a connection: 0 or a drop reason. */
__noinline int ct_admit(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();
	struct packet *p;
	struct pass *o;
	bool icmp, routed = false;
	int reason;

	if (!s)
		return DROP_INVALID_PACKET;
	p = &s->packet;
	o = &s->pass;
	if (o->local_peer) {
		o->point = POINT_FROM_ENDPOINT;
	} else if (o->sent) {
		if (o->endpoint != HOST_ENDPOINT && lb_find(0)) {
			if (!proxy_routed())
				return CT_TRANSLATE;
			routed = true;
		}
		reason = ct_classify();
		if (reason && !(routed && reason == DROP_IS_CLUSTER_IP))
			return reason;
	} else {
		/* Nobody outside of this node has a local endpoint's address. */
		if (o->from_uplink && endpoint_find(&p->src))
			return DROP_INVALID_SOURCE_IP;
		peer_resolve(o, p, 0);
		/* Nor its own; and other nodes' pods come by the tunnel, if there is one. */
		if (o->from_uplink && !p->tunnel_identity &&
		    (o->peer_identity == IDENTITY_HOST || (cfg_tunnel_ifindex && identity_is_pod(o->peer_identity))))
			return DROP_INVALID_SOURCE_IP;
		/* The proxy answers in a connection whose entry is gone: the pod's next packet makes it. */
		if (o->from_host && !o->upstream && o->peer_identity != IDENTITY_HOST && p->proto == IPPROTO_TCP &&
		    !p->starts && proxy_speaks(skb))
			return CT_UNTRACKED;
		o->point = o->peer_identity == IDENTITY_HOST ? POINT_TO_HOST : POINT_TO_NETWORK;
		/* So will the answers go. */
		if (p->tunnel_identity && !identity_is_outside(o->peer_identity))
			o->point = POINT_TO_OVERLAY;
		o->classified = 1;
	}
	if (p->service)
		o->service = p->service;
	else if (o->sent)
		o->service = ct_service();
	if (p->icmp_error)
		o->related = ct_related(skb);
	icmp = p->proto == IPPROTO_ICMP || p->proto == IPPROTO_ICMPV6;
	if (routed || o->unasked) {
		o->verdict = POLICY_NONE;
		o->audited = o->policy_direction = 0;
		o->rule = routed ? proxy_route() << RULE_BITS : 0;
		o->decided = DECIDED_NEW;
		return proxy_admit(skb, POLICY_REDIRECT);
	}
	/* By the way of the packet, not by who seems to have begun: else a SYN+ACK out of nowhere would open a port. */
	reason = policy_pass(o->sent ? DIRECTION_EGRESS : DIRECTION_INGRESS, icmp ? p->icmp_type : bpf_ntohs(p->dport));
	o->decided = DECIDED_NEW;
	if (reason)
		policy_report(skb, 0);
	return reason ?: proxy_admit(skb, o->verdict);
}

/* ct_decide decides anew for the connection whose packet is in scratch. ct_hit then keeps it, and drops. */
__noinline int ct_decide(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();
	struct decision *v;
	struct packet *p;
	struct pass *o;
	__u32 port;

	if (!s)
		return DROP_INVALID_PACKET;
	p = &s->packet;
	o = &s->pass;
	v = &s->decision;
	o->decided = DECIDED_LIVE;
	if (v->policy_direction == DIRECTION_UNKNOWN) {
		o->verdict = POLICY_NONE;
		o->audited = o->policy_direction = 0;
		o->rule = 0;
		return CT_RETRY;
	}
	if (!policy_enforced(o, v->policy_direction)) {
		policy_pass(v->policy_direction, 0);
		return CT_RETRY;
	}
	if (!o->local_peer)
		peer_resolve(o, p, v->peer_identity);
	if (p->icmp_error)
		o->related = ct_related(skb);
	if (p->proto == IPPROTO_ICMP || p->proto == IPPROTO_ICMPV6)
		port = v->icmp_type;
	else
		port = bpf_ntohs(!!o->sent == (v->policy_direction == DIRECTION_EGRESS) ? p->dport : p->sport);
	policy_pass(v->policy_direction, port);
	return CT_RETRY;
}

/* ct_insert makes a blank entry for the packet in scratch if it may have one; ct_hit then begins the connection in it.
 * It returns CT_RETRY or a drop reason. */
__noinline int ct_insert(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();
	struct packet *p;
	long err;
	int reason;

	if (!s)
		return DROP_INVALID_PACKET;
	p = &s->packet;
	if (s->pass.decided != DECIDED_NEW) {
		if (ct_carry() == CT_RETRY)
			return CT_RETRY;
		reason = ct_admit(skb);
		if (reason)
			return reason;
	}
	s->blank.conn.tail = ct_tail(&s->key);
	err = bpf_map_update_elem(&ct, &s->key, &s->blank, BPF_NOEXIST);
	if (!err || err == -EEXIST)
		return CT_RETRY;
	metric_add(METRIC_CT_FULL, 1, p->bytes);
	return DROP_CT_FULL;
}

/* ct_taken reports the connection that the one in scratch has replaced in its entry. */
__noinline int ct_taken(void)
{
	struct scratch *s = scratch_get();
	struct record *final;

	if (!s)
		return 0;
	final = &s->final;
	ct_final(final, &s->key, s->packet.now);
	if (!events_write(final)) {
		metric_add(METRIC_CT_UNREPORTED, 1, 0);
		metric_add(METRIC_CT_UNREPORTED_TRAFFIC, final->forward.packets + final->reverse.packets,
			   final->forward.bytes + final->reverse.bytes);
	}
	return 0;
}

/* ct_hit counts the packet in scratch in the entry that it has: 0, a drop reason, or CT_MISS, CT_RETRY, CT_RECLASSIFY,
 * CT_ADMIT, CT_DECIDE. What it decides
 * under the lock is kept in scratch, not in registers: the verifier then needs to look at what follows once, not once
 * for each decision. */
__noinline int ct_hit(struct __sk_buff *skb, __u32 src_is_lo)
{
	struct scratch *s = scratch_get();
	volatile struct decision *v;
	struct ct_entry *entry;
	struct ct_conn *e;
	struct packet *p;
	struct pass *o;
	bool begins;
	__u8 verdict;
	__u32 d;

	if (!s)
		return CT_MISS;
	p = &s->packet;
	o = &s->pass;
	v = &s->decision;
	v->began = v->taken = v->changed = v->slot = 0;
	entry = bpf_map_lookup_elem(&ct, &s->key);
	if (!entry)
		return CT_MISS;
	e = &entry->conn;
	bpf_spin_lock(&entry->lock);
	/* Being deleted, or deleted and used for another connection. */
	if (e->state == CT_DEAD || e->tail != ct_tail(&s->key)) {
		bpf_spin_unlock(&entry->lock);
		return CT_RETRY;
	}
	/* The peer was an endpoint of this node and is not any more: nothing known of it holds. */
	if (o->sent && !o->local_peer && !o->classified && e->out_point == POINT_FROM_ENDPOINT) {
		bpf_spin_unlock(&entry->lock);
		return CT_RECLASSIFY;
	}
	begins = p->now > e->expires || (e->state == CT_CLOSED && p->starts);
	if (begins && o->decided != DECIDED_NEW) {
		bpf_spin_unlock(&entry->lock);
		return CT_ADMIT;
	}
	/* An error is related or not, whatever the one before it was. */
	if (!begins && o->decided != DECIDED_LIVE &&
	    (e->generation != o->generation || (p->icmp_error && o->decided != DECIDED_NEW))) {
		v->policy_direction = e->policy_direction;
		v->icmp_type = e->icmp_type;
		v->peer_identity = e->peer_identity;
		bpf_spin_unlock(&entry->lock);
		return CT_DECIDE;
	}
	if (!o->peer_identity)
		o->peer_identity = e->peer_identity;
	if (!begins) {
		if (o->decided == DECIDED_LIVE) {
			/* Rules come and go: told is only what becomes of the packets. */
			if (ct_moves(e, p, o)) {
				e->state = CT_CLOSED;
				e->expires = p->now + cfg_tcp_closed;
				o->point = e->out_point;
				o->masquerade = o->sent && (e->flags & CT_MASQUERADE);
				v->d = !!o->sent == (e->direction == DIRECTION_INGRESS);
				v->slot = SLOT_OF(e->rule);
				v->flags = e->flags;
				bpf_spin_unlock(&entry->lock);
				return DROP_SLOT_CHANGED;
			}
			v->changed = ct_drops(e) != policy_drops(o->verdict, o->audited) ||
				     (o->audited && !(e->verdict & CT_AUDITED));
			ct_decided_again(e, p, o);
		}
		if (ct_drops(e)) {
			o->verdict = verdict = e->verdict;
			o->audited = 0;
			o->rule = e->rule;
			o->policy_direction = e->policy_direction;
			v->connection = e->connection;
			bpf_spin_unlock(&entry->lock);
			if (v->changed)
				policy_report(skb, v->connection);
			return policy_reason(verdict);
		}
	}
	if (o->local_peer)
		e->out_point = POINT_FROM_ENDPOINT;
	else if (o->classified)
		e->out_point = o->point;
	else
		o->masquerade = e->flags & CT_MASQUERADE;
	o->point = e->out_point;
	if (begins) {
		if (e->state != CT_NONE) {
			ct_snapshot(&s->final, e);
			v->taken = 1;
		}
		ct_init(e, p, o, src_is_lo);
		v->began = 1;
	}
	v->d = !!o->sent == (e->direction == DIRECTION_INGRESS);
	d = v->d & 1;
	v->closed = e->state == CT_CLOSED;
	v->reported = e->reported[d];
	v->emit = ct_count(e, p, d);
	if (v->emit)
		ct_snapshot(&s->record, e);
	if (o->translated)
		e->flags |= CT_TRANSLATED;
	else if (p->proto == IPPROTO_UDP && !d)
		e->flags &= ~CT_TRANSLATED; /* the port's next socket asks the backend itself */
	v->flags = e->flags;
	v->connection = e->connection;
	v->rule = e->rule;
	v->verdict = e->verdict & ~CT_AUDITED;
	v->policy_direction = e->policy_direction;
	bpf_spin_unlock(&entry->lock);

	o->masquerade = o->sent && (v->flags & CT_MASQUERADE);
	v->slot = SLOT_OF(v->rule);
	if (v->began)
		metric_add(METRIC_CT_CREATED, 1, 0);
	if (v->began && v->slot)
		metric_add(METRIC_PROXY_REDIRECTED, 1, 0);
	if (v->began && cfg_ct_earlier && ct_takeover)
		ct_mirror();
	if (v->taken)
		ct_taken();
	if (v->began || v->changed)
		policy_report(skb, v->connection);
	if (v->emit) {
		if (!v->began && !o->local_peer && p->now - v->reported > 1000000000)
			peer_resolve(o, p, o->peer_identity); /* addresses change hands */
		e->peer_identity = o->peer_identity;
		e->self_identity = o->self_identity;
		s->record.reason = v->flags & CT_RELATED ? TRACE_RELATED : v->began ? TRACE_NEW : TRACE_ESTABLISHED;
		ct_emit(skb);
	}
	return 0;
}

/* ct_update counts the packet in scratch at the observation point in scratch and reports it when due. It returns 0 or a
 * drop reason; a packet that is dropped is in no entry. */
__noinline int ct_update(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();
	struct packet *p;
	__u32 src_is_lo;
	int i, result;

	if (!s)
		return DROP_INVALID_PACKET;
	p = &s->packet;
	s->key.endpoint = s->pass.endpoint;
	s->key.proto = p->proto;
	s->key.kind = p->kind;
	src_is_lo = ct_key_make(&s->key, &p->src, &p->dst, p->sport, p->dport);
	s->pass.generation = policy_generation_now();
#pragma clang loop unroll(disable)
	for (i = 0; i < CT_TRIES; i++) {
		result = ct_hit(skb, src_is_lo);
		if (result == CT_MISS)
			result = ct_insert(skb);
		else if (result == CT_RECLASSIFY)
			result = ct_classify() ?: CT_RETRY;
		else if (result == CT_ADMIT)
			result = ct_admit(skb) ?: CT_RETRY;
		else if (result == CT_DECIDE)
			result = ct_decide(skb);
		if (result != CT_RETRY)
			return result;
	}
	/* The entry is being deleted on another CPU, longer than we care to wait: the packet goes on, in no total but
	 * this. */
	if (s->pass.decided != DECIDED_NEW) {
		result = ct_admit(skb);
		if (result)
			return result;
	}
	s->decision.slot = SLOT_OF(s->pass.rule);
	s->decision.rule = s->pass.rule;
	s->decision.verdict = s->pass.verdict;
	s->decision.policy_direction = s->pass.policy_direction;
	s->decision.d = s->decision.flags = s->decision.closed = 0;
	metric_add(METRIC_CT_UNCOUNTED, p->segments, p->bytes);
	return 0;
}

#endif
