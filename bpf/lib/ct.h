/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Connection tracking. ct_update is the one function that counts a packet at an observation point. */
#ifndef WEIR_CT_H
#define WEIR_CT_H

#include "ct_key.h"
#include "events.h"
#include "identity.h"
#include "scratch.h"

#define CT_MISS -1
#define CT_RETRY -2
#define CT_RECLASSIFY -3
#define CT_TRIES 4

#define EEXIST 17

static __always_inline bool has_handshake(__u8 proto)
{
	return proto == IPPROTO_TCP || proto == IPPROTO_SCTP;
}

static __always_inline __u64 ct_lifetime(__u8 proto, __u8 state, __u8 flags)
{
	if (has_handshake(proto)) {
		switch (state) {
		case CT_SYN_SENT:
		case CT_SYN_RECV:
			return cfg_tcp_handshake;
		case CT_FIN_WAIT:
			return cfg_tcp_closing;
		case CT_CLOSED:
			return cfg_tcp_closed;
		}
		return cfg_tcp_established;
	}
	if (proto == IPPROTO_UDP)
		return flags & CT_ANSWERED ? cfg_udp_answered : cfg_udp;
	return cfg_icmp;
}

/* ct_init begins a connection in an entry; the lock is left alone. */
static __always_inline void ct_init(struct ct_conn *e, const struct ct_key *k, const struct packet *p, const struct pass *o, __u32 src_is_lo)
{
	/* Who sends SYN+ACK did not begin it. */
	bool from_originator = (p->tcp_flags & (TCP_SYN | TCP_ACK)) != (TCP_SYN | TCP_ACK);
	bool sent = o->sent;

	e->direction = sent == from_originator ? DIRECTION_EGRESS : DIRECTION_INGRESS;
	/* Unique on a node until it boots: a CPU makes one entry of each direction per packet, and no time comes twice on it. */
	e->connection = p->now << 11 | (p->cpu & 0x3ff) << 1 | (e->direction == DIRECTION_INGRESS);
	e->tail = ct_tail(k);
	e->expires = 0;
	e->dir[0].packets = e->dir[0].bytes = e->dir[0].first = e->dir[0].last = 0;
	e->dir[1].packets = e->dir[1].bytes = e->dir[1].first = e->dir[1].last = 0;
	e->reported[0] = e->reported[1] = 0;
	e->syn_time = 0;
	e->fin_seq[0] = e->fin_seq[1] = 0;
	e->self_identity = o->self_identity;
	e->peer_identity = o->peer_identity;
	e->service = 0;
	e->ifindex = o->ifindex;
	e->handshake_us = e->srtt_us = e->retransmissions = 0;
	e->tcp_flags[0] = e->tcp_flags[1] = 0;
	e->known = 0;
	e->fins = 0;
	e->icmp_type = p->icmp_type;
	e->icmp_code = p->icmp_code;
	e->out_point = o->point;
	e->flags = (p->v4 ? CT_V4 : 0) | (sent == !!src_is_lo ? CT_LO_IS_LOCAL : 0);
	e->state = CT_ESTABLISHED;
	if (has_handshake(p->proto)) {
		if (p->starts)
			e->state = CT_SYN_SENT;
		else if (!from_originator)
			e->state = CT_SYN_RECV;
		if (!p->starts)
			e->flags |= CT_PICKED_UP;
	}
	if (sent && o->masquerade && e->direction == DIRECTION_EGRESS)
		e->flags |= CT_MASQUERADE;
}

static __always_inline void ct_state_tcp(struct ct_conn *e, const struct packet *p, __u32 d)
{
	__u8 flags = p->tcp_flags;
	__u32 other = !d;

	if (flags & TCP_RST) {
		e->state = CT_CLOSED;
		return;
	}
	switch (e->state) {
	case CT_SYN_SENT:
		if (d == 0 && p->starts)
			e->syn_time = p->now; /* of the last one: a retransmission's answer is not the first one's */
		else if (d == 1 && (flags & TCP_SYN))
			e->state = CT_SYN_RECV;
		break;
	case CT_SYN_RECV:
		if (d == 0 && (flags & TCP_ACK) && !(flags & TCP_SYN)) {
			e->state = CT_ESTABLISHED;
			if (e->syn_time) {
				e->handshake_us = (p->now - e->syn_time) / 1000;
				e->known |= KNOWN_HANDSHAKE;
			}
		}
		break;
	}
	if (flags & TCP_FIN) {
		e->fins |= 1 << d;
		e->fin_seq[d & 1] = p->seq + p->payload + 1;
	}
	if ((flags & TCP_ACK) && (e->fins & (1 << other)) && (__s32)(p->ack - e->fin_seq[other & 1]) >= 0)
		e->fins |= 4 << other;
	if (e->fins == 15)
		e->state = CT_CLOSED;
	else if (e->fins & 3)
		e->state = CT_FIN_WAIT;
}

static __always_inline void ct_state_sctp(struct ct_conn *e, const struct packet *p)
{
	switch (p->chunk) {
	case 1: /* INIT */
		if (e->state == CT_SYN_SENT)
			e->syn_time = p->now;
		break;
	case 2: /* INIT ACK */
		e->state = CT_SYN_RECV;
		break;
	case 10: /* COOKIE ECHO */
	case 11: /* COOKIE ACK */
		if (e->state == CT_SYN_RECV && e->syn_time) {
			e->handshake_us = (p->now - e->syn_time) / 1000;
			e->known |= KNOWN_HANDSHAKE;
		}
		e->state = CT_ESTABLISHED;
		break;
	case 7: /* SHUTDOWN */
	case 8: /* SHUTDOWN ACK */
		e->state = CT_FIN_WAIT;
		break;
	case 6: /* ABORT */
	case 14: /* SHUTDOWN COMPLETE */
		e->state = CT_CLOSED;
		break;
	}
}

/* ct_count adds a packet of direction d to an entry and says whether it is worth a record. The caller holds the lock, or alone has it. */
static __always_inline bool ct_count(struct ct_conn *e, const struct packet *p, __u32 d)
{
	__u8 before = e->state, news = p->tcp_flags;
	bool report;

	d &= 1;
	if (!e->dir[d].packets)
		e->dir[d].first = p->now;
	e->dir[d].packets += p->segments;
	e->dir[d].bytes += p->bytes;
	if (e->dir[d].last < p->now) /* two CPUs may come in either order */
		e->dir[d].last = p->now;
	if (e->dir[0].packets && e->dir[1].packets)
		e->flags |= CT_ANSWERED;
	news &= ~e->tcp_flags[d];
	e->tcp_flags[d] |= p->tcp_flags;
	if (p->fragment != FRAGMENT_LATER) {
		if (p->proto == IPPROTO_TCP)
			ct_state_tcp(e, p, d);
		else if (p->proto == IPPROTO_SCTP)
			ct_state_sctp(e, p);
	}
	e->expires = p->now + ct_lifetime(p->proto, e->state, e->flags);
	report = cfg_every_packet || news || (p->tcp_flags & (TCP_SYN | TCP_FIN | TCP_RST)) || !e->reported[d] ||
		 p->now - e->reported[d] >= cfg_report_interval || (p->proto == IPPROTO_SCTP && before != e->state);
	if (report)
		e->reported[d] = p->now;
	return report;
}

static __always_inline void ct_snapshot(struct record *r, const struct ct_conn *e)
{
	r->connection = e->connection;
	r->forward = e->dir[0];
	r->reverse = e->dir[1];
	r->service = e->service;
	r->handshake_us = e->handshake_us;
	r->srtt_us = e->srtt_us;
	r->retransmissions = e->retransmissions;
	r->direction = e->direction;
	r->known = e->known;
	r->state = e->state;
	r->forward_flags = e->tcp_flags[0];
	r->reverse_flags = e->tcp_flags[1];
	r->point = e->out_point; /* the caller has the last word */
	r->flags = (e->flags & CT_PICKED_UP ? RECORD_PICKED_UP : 0) | (e->flags & CT_MASQUERADE ? RECORD_MASQUERADED : 0);
	r->ip_version = e->flags & CT_V4 ? 4 : 6;
}

/* ct_final makes an entry's final record: everything that does not depend on a packet. */
static __always_inline void ct_final(struct record *r, const struct ct_conn *e, const struct ct_key *k, __u64 now)
{
	bool egress = e->direction == DIRECTION_EGRESS, local_is_lo = e->flags & CT_LO_IS_LOCAL;
	bool originator_is_lo = egress == local_is_lo;

	ct_snapshot(r, e);
	r->time = now;
	r->type = RECORD_FINAL;
	r->reason = TRACE_UNKNOWN;
	r->point = egress ? e->out_point : POINT_TO_ENDPOINT;
	r->src = originator_is_lo ? k->lo : k->hi;
	r->dst = originator_is_lo ? k->hi : k->lo;
	r->sport = r->dport = 0;
	if (k->proto != IPPROTO_ICMP && k->proto != IPPROTO_ICMPV6) {
		r->sport = bpf_ntohs(originator_is_lo ? k->lo_port : k->hi_port);
		r->dport = bpf_ntohs(originator_is_lo ? k->hi_port : k->lo_port);
	}
	r->src_identity = egress ? e->self_identity : e->peer_identity;
	r->dst_identity = egress ? e->peer_identity : e->self_identity;
	r->endpoint = k->endpoint;
	r->ifindex = e->ifindex;
	r->proto = k->proto;
	r->icmp_type = e->icmp_type;
	r->icmp_code = e->icmp_code;
	r->length = 0;
	r->rule = 0;
	r->tcp_flags = 0;
	r->xlated.hi = r->xlated.lo = 0;
	r->xlated_port = 0;
	r->socket_cookie = r->cgroup_id = 0;
	__builtin_memset(r->src_mac, 0, sizeof(r->src_mac));
	__builtin_memset(r->dst_mac, 0, sizeof(r->dst_mac));
	__builtin_memset(r->pad, 0, sizeof(r->pad));
}

/* ct_emit completes the record in scratch, whose totals are there, and writes it. */
static __always_inline void ct_emit(struct __sk_buff *skb, struct scratch *s, bool is_new)
{
	struct record *r = &s->record;
	struct packet *p = &s->packet;
	struct pass *o = &s->pass;
	bool reply = !!o->sent == (r->direction == DIRECTION_INGRESS);
	__u8 mac[12];

	r->time = p->now;
	r->type = RECORD_TRACE;
	r->src = p->src;
	r->dst = p->dst;
	r->xlated.hi = r->xlated.lo = 0;
	r->socket_cookie = r->cgroup_id = 0;
	r->xlated_port = 0;
	r->sport = r->dport = 0;
	if (p->proto != IPPROTO_ICMP && p->proto != IPPROTO_ICMPV6) {
		r->sport = bpf_ntohs(p->sport);
		r->dport = bpf_ntohs(p->dport);
	}
	r->endpoint = o->endpoint;
	r->src_identity = o->sent ? o->self_identity : o->peer_identity;
	r->dst_identity = o->sent ? o->peer_identity : o->self_identity;
	r->rule = 0;
	r->ifindex = o->ifindex;
	r->length = p->length;
	if (r->reason != TRACE_RELATED)
		r->reason = is_new ? TRACE_NEW : reply ? TRACE_REPLY : TRACE_ESTABLISHED;
	if (!o->sent)
		r->point = POINT_TO_ENDPOINT;
	r->proto = p->proto;
	r->tcp_flags = p->tcp_flags;
	r->icmp_type = p->icmp_type;
	r->icmp_code = p->icmp_code;
	r->flags |= (reply ? RECORD_IS_REPLY : 0) | (p->fragment ? RECORD_FRAGMENT : 0);
	bpf_skb_load_bytes(skb, 0, mac, sizeof(mac));
	__builtin_memcpy(r->dst_mac, mac, 6);
	__builtin_memcpy(r->src_mac, mac + 6, 6);
	events_write(r);
}

/* ct_classify decides where a packet goes that an endpoint sends to somebody else than a local endpoint; it returns 0 or a drop reason. */
static __always_inline int ct_classify(struct scratch *s)
{
	struct packet *p = &s->packet;
	struct pass *o = &s->pass;
	struct ipcache_entry *found = ipcache_find(&p->dst);
	__u32 flags = found ? found->flags : 0;

	o->peer_identity = found && found->identity ? found->identity : identity_world(&p->dst);
	o->classified = 1;
	o->point = o->peer_identity == IDENTITY_HOST ? POINT_TO_HOST : POINT_TO_NETWORK;
	if (flags & IPCACHE_LOCAL_PODS)
		return DROP_UNROUTABLE;
	if (flags & IPCACHE_SERVICES) {
		struct service_key key = { .addr = p->dst, .port = p->dport, .proto = p->proto };

		/* Sockets are translated before they send: what still has a service address met no backend, or is no socket's. */
		return bpf_map_lookup_elem(&services, &key) ? DROP_NO_BACKEND : DROP_IS_CLUSTER_IP;
	}
	o->masquerade = cfg_masquerade && identity_is_outside(o->peer_identity) && !(flags & IPCACHE_NO_MASQUERADE) &&
			(p->v4 ? cfg_node_v4.lo : cfg_node_v6.lo);
	return 0;
}

#define SVCCONN_UDP_AGE 10000000000ULL

/* ct_service finds the service that a connection began on, as the socket hooks noted it. A note of TCP is of this very connection; one of
 * UDP may be of an earlier socket of the port, so that it must be fresh. */
static __always_inline __u32 ct_service(const struct packet *p)
{
	struct svcconn_key key = {
		.local = p->src, .remote = p->dst, .local_port = p->sport, .remote_port = p->dport, .proto = p->proto
	};
	struct svcconn_note *note;

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

/* ct_related says whether an ICMP error is about a connection of the endpoint: its inner packet is one that the connection had. */
static __always_inline bool ct_related(struct __sk_buff *skb, const struct scratch *s)
{
	const struct packet *p = &s->packet;
	struct ct_key key = { .endpoint = s->pass.endpoint };
	struct addr src, dst;
	__u32 offset = p->l4 + 8;
	__be16 ports[4] = {};
	__u8 proto;

	if (p->v4) {
		struct iphdr ip;

		if (bpf_skb_load_bytes(skb, offset, &ip, sizeof(ip)))
			return false;
		addr_from_v4(&src, ip.saddr);
		addr_from_v4(&dst, ip.daddr);
		proto = ip.protocol;
		offset += ip.ihl * 4;
	} else {
		struct ipv6hdr ip;

		if (bpf_skb_load_bytes(skb, offset, &ip, sizeof(ip)))
			return false;
		src.hi = ip.saddr[0];
		src.lo = ip.saddr[1];
		dst.hi = ip.daddr[0];
		dst.lo = ip.daddr[1];
		proto = ip.nexthdr;
		offset += sizeof(ip);
	}
	if (bpf_skb_load_bytes(skb, offset, ports, sizeof(ports)))
		return false;
	if (proto == IPPROTO_ICMP || proto == IPPROTO_ICMPV6) {
		__u8 type = *(__u8 *)ports;
		bool request = type == 8 || type == 128;

		ports[0] = request ? ports[2] : 0;
		ports[1] = request ? 0 : ports[2];
	}
	key.proto = proto;
	ct_key_make(&key, &src, &dst, ports[0], ports[1]);
	return bpf_map_lookup_elem(&ct, &key);
}

/* ct_create makes an entry for the packet in scratch: 0, a drop reason, or CT_RETRY when another CPU was faster. */
__noinline int ct_create(struct __sk_buff *skb, __u32 src_is_lo)
{
	struct scratch *s = scratch_get();
	struct ct_conn *e;
	struct packet *p;
	struct pass *o;
	long err;
	int reason;

	if (!s)
		return DROP_INVALID_PACKET;
	p = &s->packet;
	o = &s->pass;
	if (o->local_peer) {
		o->point = POINT_FROM_ENDPOINT;
	} else if (o->sent) {
		reason = ct_classify(s);
		if (reason)
			return reason;
	} else {
		/* Nobody outside of this node has a local endpoint's address. */
		if (o->from_uplink && endpoint_find(&p->src))
			return DROP_INVALID_SOURCE_IP;
		o->peer_identity = identity_find(&p->src);
		o->point = o->peer_identity == IDENTITY_HOST ? POINT_TO_HOST : POINT_TO_NETWORK;
	}
	__builtin_memset(&s->entry, 0, sizeof(s->entry));
	e = &s->entry.conn;
	ct_init(e, &s->key, p, o, src_is_lo);
	if (e->direction == DIRECTION_EGRESS && o->sent)
		e->service = ct_service(p);
	s->record.reason = 0;
	if (p->icmp_error && ct_related(skb, s)) {
		e->flags |= CT_RELATED;
		s->record.reason = TRACE_RELATED;
	}
	ct_count(e, p, !!o->sent == (e->direction == DIRECTION_INGRESS));
	err = bpf_map_update_elem(&ct, &s->key, &s->entry, BPF_NOEXIST);
	if (err == -EEXIST)
		return CT_RETRY;
	if (err) {
		metric_add(METRIC_CT_FULL, 1, p->bytes);
		return DROP_CT_FULL;
	}
	metric_add(METRIC_CT_CREATED, 1, 0);
	ct_snapshot(&s->record, e);
	o->masquerade = !!(e->flags & CT_MASQUERADE);
	ct_emit(skb, s, true);
	return 0;
}

/* ct_hit counts the packet in scratch in the entry that it has: 0, or CT_MISS, CT_RETRY, CT_RECLASSIFY. */
__noinline int ct_hit(struct __sk_buff *skb, __u32 src_is_lo)
{
	struct scratch *s = scratch_get();
	bool emit, taken = false, related, stale;
	struct ct_entry *entry;
	struct ct_conn *e;
	struct packet *p;
	struct pass *o;
	__u64 reported;
	__u32 d;

	if (!s)
		return CT_MISS;
	p = &s->packet;
	o = &s->pass;
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
	if (p->now > e->expires || (e->state == CT_CLOSED && p->starts)) {
		__u8 masquerade = o->masquerade, point = o->point;
		__u32 peer = o->peer_identity;

		ct_final(&s->final, e, &s->key, p->now);
		if (!o->classified) {
			o->masquerade = !!(e->flags & CT_MASQUERADE);
			o->point = e->out_point;
			if (!peer)
				o->peer_identity = e->peer_identity;
		}
		ct_init(e, &s->key, p, o, src_is_lo);
		o->masquerade = masquerade;
		o->point = point;
		o->peer_identity = peer;
		taken = true;
	}
	if (o->local_peer)
		e->out_point = POINT_FROM_ENDPOINT;
	else if (o->classified)
		e->out_point = o->point;
	d = !!o->sent == (e->direction == DIRECTION_INGRESS);
	reported = e->reported[d & 1];
	emit = ct_count(e, p, d);
	if (emit)
		ct_snapshot(&s->record, e);
	if (!o->peer_identity)
		o->peer_identity = e->peer_identity;
	o->masquerade = o->sent && (e->flags & CT_MASQUERADE);
	related = e->flags & CT_RELATED;
	bpf_spin_unlock(&entry->lock);

	if (taken) {
		metric_add(METRIC_CT_CREATED, 1, 0);
		if (!events_write(&s->final)) {
			metric_add(METRIC_CT_UNREPORTED, 1, 0);
			metric_add(METRIC_CT_UNREPORTED_TRAFFIC, s->final.forward.packets + s->final.reverse.packets,
				   s->final.forward.bytes + s->final.reverse.bytes);
		}
	}
	if (emit) {
		stale = p->now - reported > 1000000000;
		if (stale && !o->local_peer) /* addresses change hands */
			o->peer_identity = identity_find(o->sent ? &p->dst : &p->src);
		e->peer_identity = o->peer_identity;
		e->self_identity = o->self_identity;
		s->record.reason = related ? TRACE_RELATED : 0;
		ct_emit(skb, s, taken);
	}
	return 0;
}

/* ct_update counts the packet in scratch at the observation point in scratch and reports it when due. It returns 0 or a drop reason; a packet
 * that is dropped is in no entry. */
static __always_inline int ct_update(struct __sk_buff *skb, struct scratch *s)
{
	struct packet *p = &s->packet;
	__u32 src_is_lo;
	int i, result;

	s->key.endpoint = s->pass.endpoint;
	s->key.proto = p->proto;
	s->key.kind = p->kind;
	src_is_lo = ct_key_make(&s->key, &p->src, &p->dst, p->sport, p->dport);
#pragma clang loop unroll(disable)
	for (i = 0; i < CT_TRIES; i++) {
		result = ct_hit(skb, src_is_lo);
		if (result == CT_MISS)
			result = ct_create(skb, src_is_lo);
		if (result == CT_RECLASSIFY) {
			result = ct_classify(s);
			if (result)
				return result;
			continue;
		}
		if (result != CT_RETRY)
			return result;
	}
	/* The entry is being deleted on another CPU, longer than we care to wait: the packet goes on, in no total but this. */
	metric_add(METRIC_CT_UNCOUNTED, p->segments, p->bytes);
	return 0;
}

#endif
