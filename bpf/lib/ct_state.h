/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What an entry of ct goes through: how it begins, what each packet makes of it, and what a record tells of it. */
#ifndef WEIR_CT_STATE_H
#define WEIR_CT_STATE_H

#include "ct_key.h"
#include "policy.h"

/* What the steps of ct_update return, besides 0 and drop reasons. */
#define CT_MISS	      -1
#define CT_RETRY      -2
#define CT_RECLASSIFY -3
#define CT_ADMIT      -4 /* a connection would begin: may it? */
#define CT_DECIDE     -5 /* policy has changed since the connection was decided */
#define CT_TRANSLATE  -6 /* the packet goes to a service */
#define CT_UNTRACKED  -7 /* the packet passes without an entry */
#define CT_TRIES      6

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

/* ct_decided keeps what policy decided, which is in scratch. */
static __always_inline void ct_decided(struct ct_conn *e, const struct pass *o)
{
	e->policy_direction = o->policy_direction;
	e->verdict = o->verdict | (o->audited ? CT_AUDITED : 0);
	e->rule = o->rule;
	e->generation = o->generation;
}

/* ct_decided_again is ct_decided for a live connection: it stays on its slot, whatever becomes of it. Only what has no
 * connection to lose goes to another one. */
static __always_inline void ct_decided_again(struct ct_conn *e, const struct packet *p, const struct pass *o)
{
	__u32 slot = SLOT_OF(p->proto == IPPROTO_UDP && o->verdict == POLICY_REDIRECT ? o->rule : e->rule);

	ct_decided(e, o);
	e->rule = slot << RULE_BITS | RULE_OF(o->rule);
}

/* ct_moves says whether the new decision of a live connection sends it to another slot than its own, or to one when it
 * had none. Resets pass: they end it as well. */
static __always_inline bool ct_moves(const struct ct_conn *e, const struct packet *p, const struct pass *o)
{
	return o->verdict == POLICY_REDIRECT && SLOT_OF(o->rule) != SLOT_OF(e->rule) && p->proto != IPPROTO_UDP &&
	       !(p->tcp_flags & TCP_RST);
}

/* ct_drops says whether policy has cut the connection. */
static __always_inline bool ct_drops(const struct ct_conn *e)
{
	return policy_drops(e->verdict & ~CT_AUDITED, e->verdict & CT_AUDITED);
}

/* ct_init begins a connection in an entry of its key. */
static __always_inline void ct_init(struct ct_conn *e, const struct packet *p, const struct pass *o, __u32 src_is_lo)
{
	/* Who sends SYN+ACK did not begin it. */
	bool from_originator = (p->tcp_flags & (TCP_SYN | TCP_ACK)) != (TCP_SYN | TCP_ACK);
	bool sent = o->sent;

	e->direction = sent == from_originator ? DIRECTION_EGRESS : DIRECTION_INGRESS;
	/* Unique on a node until it boots: a CPU makes one entry of each direction per packet, and no time comes twice
	 * on it. */
	e->connection = p->now << 11 | (p->cpu & 0x3ff) << 1 | (e->direction == DIRECTION_INGRESS);
	e->dir[0].packets = e->dir[0].bytes = e->dir[0].first = e->dir[0].last = 0;
	e->dir[1].packets = e->dir[1].bytes = e->dir[1].first = e->dir[1].last = 0;
	e->reported[0] = e->reported[1] = 0;
	e->syn_time = 0;
	e->fin_seq[0] = e->fin_seq[1] = 0;
	e->self_identity = o->self_identity;
	e->peer_identity = o->peer_identity;
	e->service = 0;
	if (e->direction == (sent ? DIRECTION_EGRESS : DIRECTION_INGRESS))
		e->service = o->service;
	e->ifindex = o->ifindex;
	e->handshake_us = e->srtt_us = e->retransmissions = 0;
	e->tcp_flags[0] = e->tcp_flags[1] = 0;
	e->known = 0;
	e->fins = 0;
#ifdef WEIR_NEXT_LAYOUT
	e->carried = 0;
#endif
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
	if (o->related)
		e->flags |= CT_RELATED;
	if (o->translated)
		e->flags |= CT_TRANSLATED;
	if (o->upstream)
		e->flags |= CT_UPSTREAM;
	if (sent && o->masquerade && e->direction == DIRECTION_EGRESS)
		e->flags |= CT_MASQUERADE;
	ct_decided(e, o);
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
	case 6:	 /* ABORT */
	case 14: /* SHUTDOWN COMPLETE */
		e->state = CT_CLOSED;
		break;
	}
}

/* ct_count adds a packet of direction d to an entry and says whether it is worth a record. The caller holds the lock,
 * or alone has it. */
static __always_inline bool ct_count(struct ct_conn *e, const struct packet *p, __u32 d)
{
	__u8 before = e->state, news = p->tcp_flags;
	bool report;

	d &= 1;
	if (!e->dir[d].packets)
		e->dir[d].first = p->now;
	e->dir[d].packets += p->segments;
#ifdef WEIR_NEXT_LAYOUT
	e->carried += p->segments;
#endif
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

/* ct_snapshot copies what a record tells of a connection; it is short, since it runs under the lock. */
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
	r->src_identity = e->self_identity;
	r->dst_identity = e->peer_identity;
	r->ifindex = e->ifindex;
	r->icmp_type = e->icmp_type;
	r->icmp_code = e->icmp_code;
	r->rule = e->rule;
	r->verdict = e->verdict; /* with CT_AUDITED, until ct_flags_out */
	r->flags = e->flags;	 /* as enum ct_flags, until ct_flags_out */
}

/* ct_flags_out turns the flags of a snapshot into those of a record. */
static __always_inline void ct_flags_out(struct record *r, __u8 more)
{
	__u8 flags = r->flags;

	_Static_assert(CT_PICKED_UP * 4 == RECORD_PICKED_UP && CT_MASQUERADE * 8 == RECORD_MASQUERADED && CT_V4 == 8,
		       "bits move together");
	r->ip_version = 6 - (flags & CT_V4) / 4;
	r->slot = SLOT_OF(r->rule);
	r->rule = RULE_OF(r->rule);
	r->flags = (flags & CT_PICKED_UP) * 4 | (flags & CT_MASQUERADE) * 8 | more;
	if (r->verdict & CT_AUDITED)
		r->flags |= RECORD_AUDITED;
	r->verdict &= ~CT_AUDITED;
}

/* ct_final makes a final record of a snapshot. */
static __always_inline void ct_final(struct record *r, const struct ct_key *k, __u64 now)
{
	bool egress = r->direction == DIRECTION_EGRESS, local_is_lo = r->flags & CT_LO_IS_LOCAL;
	__u32 self = r->src_identity, peer = r->dst_identity;

	r->time = now;
	r->type = RECORD_FINAL;
	r->reason = TRACE_UNKNOWN;
	if (!egress) {
		r->point = POINT_TO_ENDPOINT;
		r->src_identity = peer;
		r->dst_identity = self;
	}
	if (egress == local_is_lo) {
		r->src = k->lo;
		r->dst = k->hi;
		r->sport = bpf_ntohs(k->lo_port);
		r->dport = bpf_ntohs(k->hi_port);
	} else {
		r->src = k->hi;
		r->dst = k->lo;
		r->sport = bpf_ntohs(k->hi_port);
		r->dport = bpf_ntohs(k->lo_port);
	}
	if (k->proto == IPPROTO_ICMP || k->proto == IPPROTO_ICMPV6)
		r->sport = r->dport = 0;
	r->endpoint = k->endpoint;
	r->proto = k->proto;
	r->length = 0;
	r->tcp_flags = 0;
	r->xlated.hi = r->xlated.lo = 0;
	r->xlated_port = 0;
	r->socket_cookie = r->cgroup_id = 0;
	__builtin_memset(r->src_mac, 0, sizeof(r->src_mac));
	__builtin_memset(r->dst_mac, 0, sizeof(r->dst_mac));
	__builtin_memset(r->pad, 0, sizeof(r->pad));
	ct_flags_out(r, 0);
}

#endif
