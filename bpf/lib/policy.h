/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Deciding by policy. policy_decide is the one function that says what a policy makes of a packet; policy_pass asks it
 * for the packet in scratch at the observation point in scratch. */
#ifndef WEIR_POLICY_H
#define WEIR_POLICY_H

#include "events.h"
#include "identity.h"
#include "policy_types.h"
#include "scratch.h"

#define POLICY_TRIES 3

#define POLICY_WORD(verdict, rule) ((__u64)(verdict) << 32 | (rule))

static __always_inline __u64 policy_check(const struct policy_peer_key *key, __u64 block)
{
	return ((__u64)key->policy << 32 | key->peer) ^ block * 0x9e3779b97f4a7c15ULL;
}

/* policy_find reads the row of a key in policy_peers or fqdn_peers: its block, or 0. */
static __always_inline __u64 policy_find(void *rows, const struct policy_peer_key *key)
{
	struct policy_peer *row;
	__u64 block, check;
	int i;

#pragma clang loop unroll(disable)
	for (i = 0; i < POLICY_TRIES; i++) {
		row = bpf_map_lookup_elem(rows, key);
		if (!row)
			return 0;
		block = *(volatile __u64 *)&row->block;
		check = *(volatile __u64 *)&row->check;
		if (check == policy_check(key, block))
			return block;
	}
	return 0;
}

/* policy_search finds the word of a protocol and port in a block of policy_ranges or fqdn_ranges. */
static __always_inline __u64 policy_search(void *ranges, __u64 block, __u32 start)
{
	__u64 range, best = 0, *found;
	__u32 base, low, high, i, index;

	if (!block)
		return POLICY_WORD(POLICY_DEFAULT_DENY, 0);
	base = block >> 32;
	low = 0;
	high = block; /* the range looked for is in [low, high) */
#pragma clang loop unroll(disable)
	for (i = 0; i < POLICY_BLOCK_BITS + 1; i++) {
		if (low >= high)
			break;
		index = base + (low + high) / 2;
		found = bpf_map_lookup_elem(ranges, &index);
		if (!found)
			return POLICY_WORD(POLICY_DEFAULT_DENY, 0);
		range = *(volatile __u64 *)found;
		if (POLICY_RANGE_START(range) <= start) {
			best = range;
			low = index - base + 1;
		} else {
			high = index - base;
		}
	}
	switch (POLICY_RANGE_VERDICT(best)) {
	case POLICY_ALLOW:
	case POLICY_DEFAULT_DENY:
	case POLICY_DENY:
	case POLICY_REDIRECT:
	case POLICY_VISIBLE:
		return POLICY_WORD(POLICY_RANGE_VERDICT(best), POLICY_RANGE_RULE(best));
	}
	return POLICY_WORD(POLICY_DEFAULT_DENY, 0);
}

/* policy_decide returns verdict << 32 | slot << 20 | rule of a policy for a peer, a protocol and a port (start =
 * protocol << 16 | port). What it does not find it denies. */
__noinline __u64 policy_decide(__u32 policy, __u32 peer, __u32 start)
{
	struct policy_peer_key key = {.policy = policy, .peer = peer};
	__u64 block = policy_find(&policy_peers, &key);

	if (!block) {
		key.peer = 0;
		block = policy_find(&policy_peers, &key);
	}
	return policy_search(&policy_ranges, block, start);
}

/* policy_by_name is policy_decide for a set of names that the peer's address has. */
__noinline __u64 policy_by_name(__u32 policy, __u32 set, __u32 start)
{
	struct policy_peer_key key = {.policy = policy, .peer = set};

	return policy_search(&fqdn_ranges, policy_find(&fqdn_peers, &key), start);
}

static __always_inline __u32 policy_generation_now(void)
{
	__u32 zero = 0;
	__u64 *now = bpf_map_lookup_elem(&policy_generation, &zero);

	return now ? (__u32) * (volatile __u64 *)now : 0;
}

/* policy_of returns an endpoint's policies: ingress | egress << 32. */
static __always_inline __u64 policy_of(__u32 endpoint)
{
	__u64 *found = bpf_map_lookup_elem(&policy_endpoints, &endpoint);

	/* There is a row for every number; an endpoint that has none is denied all. */
	return found ? *(volatile __u64 *)found : POLICY_NUMBER | (__u64)POLICY_NUMBER << 32;
}

/* policy_drops says whether a decision drops. */
static __always_inline bool policy_drops(__u8 verdict, bool audited)
{
	return (verdict == POLICY_DENY || verdict == POLICY_DEFAULT_DENY) && !audited;
}

static __always_inline int policy_reason(__u8 verdict)
{
	return verdict == POLICY_DENY ? DROP_POLICY_DENY : DROP_POLICY;
}

/* policy_always: without these, paths with a small MTU stop working in a way that nobody understands. */
static __always_inline bool policy_always(const struct packet *p)
{
	if (p->proto == IPPROTO_ICMP)
		return p->icmp_type == 3 && p->icmp_code == 4;
	return p->proto == IPPROTO_ICMPV6 && p->icmp_type == 2;
}

/* policy_enforced returns the policy that holds in a direction for the endpoint in scratch, with its audit bit, or 0.
 */
static __always_inline __u32 policy_enforced(const struct pass *o, __u32 direction)
{
	__u64 both = policy_of(o->endpoint);
	__u32 one = direction == DIRECTION_INGRESS ? (__u32)both : both >> 32;

	return one & POLICY_NUMBER ? one : 0;
}

/* policy_pass decides for the endpoint and peer in scratch and leaves verdict, slot, rule and audit there. port: of the
 * forward direction, host order; of ICMP, the type. */
__noinline int policy_pass(__u32 direction, __u32 port)
{
	struct scratch *s = scratch_get();
	struct packet *p;
	struct pass *o;
	__u32 policy, start, *set;
	__u64 word, named;

	if (!s)
		return DROP_INVALID_PACKET;
	p = &s->packet;
	o = &s->pass;
	o->policy_direction = direction;
	o->verdict = POLICY_NONE;
	o->audited = 0;
	o->rule = 0;
	policy = policy_enforced(o, direction);
	if (!policy || o->hairpin || o->related || policy_always(p))
		return 0;
	start = (__u32)p->proto << 16 | (port & 0xffff);
	word = policy_decide(policy & POLICY_NUMBER, o->peer, start);
	o->verdict = word >> 32;
	if (direction == DIRECTION_EGRESS && (o->verdict == POLICY_DEFAULT_DENY || o->verdict == POLICY_REDIRECT) &&
	    identity_is_outside(o->peer_identity)) {
		set = bpf_map_lookup_elem(&fqdn, o->sent ? &p->dst : &p->src);
		named = set ? policy_by_name(policy & POLICY_NUMBER, *set, start) : 0;
		if (set && !policy_drops(named >> 32, false)) {
			word = named;
			o->verdict = word >> 32;
		}
	}
	o->rule = word;
	o->audited = policy_drops(o->verdict, false) && (policy & POLICY_AUDIT);
	return policy_drops(o->verdict, o->audited) ? policy_reason(o->verdict) : 0;
}

/* policy_report counts the decision in scratch and tells it. connection is 0 when none begins. */
__noinline int policy_report(struct __sk_buff *skb, __u64 connection)
{
	struct scratch *s = scratch_get();
	bool drops, ingress;
	struct packet *p;
	struct record *r;
	struct pass *o;

	if (!s)
		return 0;
	p = &s->packet;
	o = &s->pass;
	if (o->verdict == POLICY_NONE)
		return 0;
	drops = policy_drops(o->verdict, o->audited);
	ingress = o->policy_direction == DIRECTION_INGRESS;
	metric_add((drops ? METRIC_POLICY_DENIED_IN : METRIC_POLICY_ALLOWED_IN) + !ingress, 1, p->bytes);
	r = &s->final;
	__builtin_memset(r, 0, sizeof(*r));
	r->type = RECORD_VERDICT;
	r->time = p->now;
	r->connection = connection;
	r->src = p->src;
	r->dst = p->dst;
	if (p->proto != IPPROTO_ICMP && p->proto != IPPROTO_ICMPV6) {
		r->sport = bpf_ntohs(p->sport);
		r->dport = bpf_ntohs(p->dport);
	}
	r->endpoint = o->endpoint;
	r->src_identity = o->sent ? o->self_identity : o->peer_identity;
	r->dst_identity = o->sent ? o->peer_identity : o->self_identity;
	r->service = o->sent ? o->service : 0;
	r->direction = o->policy_direction;
	r->verdict = o->verdict;
	r->rule = RULE_OF(o->rule);
	r->slot = SLOT_OF(o->rule);
	r->reason = drops ? policy_reason(o->verdict) : 0;
	r->point = o->sent ? o->point : POINT_TO_ENDPOINT;
	r->ifindex = o->ifindex;
	r->length = p->length;
	r->proto = p->proto;
	r->tcp_flags = p->tcp_flags;
	r->icmp_type = p->icmp_type;
	r->icmp_code = p->icmp_code;
	r->ip_version = p->v4 ? 4 : 6;
	r->flags = (p->fragment ? RECORD_FRAGMENT : 0) | (o->audited ? RECORD_AUDITED : 0) |
		   (!!o->sent == ingress ? RECORD_IS_REPLY : 0);
	bpf_skb_load_bytes(skb, 0, r->dst_mac, sizeof(r->dst_mac));
	bpf_skb_load_bytes(skb, 6, r->src_mac, sizeof(r->src_mac));
	events_write(r);
	return 0;
}

#endif
