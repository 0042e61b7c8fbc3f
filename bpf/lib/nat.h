/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Masquerading of TCP, UDP, SCTP, ICMP echo, and of the ICMP errors about them. A claim lives as long as the
 * connection's ct entry. */
#ifndef WEIR_NAT_H
#define WEIR_NAT_H

#include "config.h"
#include "ct.h"
#include "frags.h"
#include "nat_types.h"
#include "scratch.h"
#include "sctp.h"

#define NAT_TRIES 32

/* What nat_in found, besides a drop reason. */
#define NAT_NOT_OURS   0
#define NAT_TRANSLATED 1

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536); /* sized */
	__type(key, struct nat_key);
	__type(value, struct nat_entry);
} nat SEC(".maps"); /* written: to_network, sweep; read: to_network, from_network */

static __always_inline void node_address(struct addr *a, bool v4)
{
	const volatile struct addr *node = v4 ? &cfg_node_v4 : &cfg_node_v6;

	a->hi = node->hi;
	a->lo = node->lo;
}

/* nat_checksum returns the offset of a protocol's checksum in its header. */
static __always_inline __u32 nat_checksum(__u8 proto)
{
	return proto == IPPROTO_TCP ? 16 : proto == IPPROTO_UDP ? 6 : 2;
}

static __always_inline __u64 nat_checksum_flags(__u8 proto)
{
	return proto == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;
}

/* nat_address replaces the packet's source or destination, in the header and in the checksums. */
static __always_inline int nat_address(struct __sk_buff *skb, struct packet *p, bool source, struct addr *now)
{
	struct addr *old = source ? &p->src : &p->dst;
	__u64 flags = BPF_F_PSEUDO_HDR | nat_checksum_flags(p->proto);
	__u32 checksum = p->l4 + nat_checksum(p->proto);
	bool has_l4 = p->fragment != FRAGMENT_LATER;

	if (p->v4) {
		__be32 was = addr_v4(old), is = addr_v4(now);

		if (has_l4 && p->proto != IPPROTO_ICMP && p->proto != IPPROTO_SCTP &&
		    bpf_l4_csum_replace(skb, checksum, was, is, flags | 4))
			return DROP_WRITE_ERROR;
		if (bpf_l3_csum_replace(skb, ETH_HLEN + 10, was, is, 4) ||
		    bpf_skb_store_bytes(skb, ETH_HLEN + (source ? 12 : 16), &is, 4, 0))
			return DROP_WRITE_ERROR;
	} else {
		__s64 diff = bpf_csum_diff((__be32 *)old, sizeof(*old), (__be32 *)now, sizeof(*now), 0);

		if (has_l4 && p->proto != IPPROTO_SCTP && bpf_l4_csum_replace(skb, checksum, 0, diff, flags))
			return DROP_WRITE_ERROR;
		if (bpf_skb_store_bytes(skb, ETH_HLEN + (source ? 8 : 24), now, sizeof(*now),
					p->proto == IPPROTO_SCTP ? BPF_F_RECOMPUTE_CSUM : 0))
			return DROP_WRITE_ERROR;
	}
	*old = *now;
	return 0;
}

/* nat_sctp_ports replaces a port of SCTP. The checksum of a GSO packet is not made yet. */
static __always_inline int nat_sctp_ports(struct __sk_buff *skb, struct packet *p, bool source, __be16 now)
{
	__u32 change = (__u32)((source ? p->sport : p->dport) ^ now) << (source ? 0 : 16);
	__u32 checksum;

	if (p->fragment)
		return DROP_NAT_PROTOCOL; /* the rest of the packet is needed */
	if (!skb->gso_size) {
		if (bpf_skb_load_bytes(skb, p->l4 + 8, &checksum, sizeof(checksum)))
			return DROP_WRITE_ERROR;
		checksum ^= sctp_checksum_change(change, p->length + ETH_HLEN - p->l4);
		if (bpf_skb_store_bytes(skb, p->l4 + 8, &checksum, sizeof(checksum), BPF_F_RECOMPUTE_CSUM))
			return DROP_WRITE_ERROR;
	}
	return bpf_skb_store_bytes(skb, p->l4 + (source ? 0 : 2), &now, 2, BPF_F_RECOMPUTE_CSUM) ? DROP_WRITE_ERROR : 0;
}

/* nat_port replaces the packet's source or destination port, or the id of an echo. */
static __always_inline int nat_port(struct __sk_buff *skb, struct packet *p, bool source, __be16 now)
{
	__be16 *old = source ? &p->sport : &p->dport;
	bool icmp = p->proto == IPPROTO_ICMP || p->proto == IPPROTO_ICMPV6;
	__u32 checksum = p->l4 + nat_checksum(p->proto);
	__u32 offset = p->l4 + (icmp ? 4 : source ? 0 : 2);

	if (p->fragment != FRAGMENT_LATER && *old != now) {
		if (p->proto == IPPROTO_SCTP) {
			int reason = nat_sctp_ports(skb, p, source, now);

			if (reason)
				return reason;
			*old = now;
			return 0;
		}
		if (bpf_l4_csum_replace(skb, checksum, *old, now, nat_checksum_flags(p->proto) | 2) ||
		    bpf_skb_store_bytes(skb, offset, &now, 2, 0))
			return DROP_WRITE_ERROR;
	}
	*old = now;
	return 0;
}

/* nat_claim takes a free port of the node for a connection to one peer. */
static __always_inline int nat_claim(const struct nat_key *out, struct nat_entry *claimed)
{
	struct nat_key in = {
	    .src = out->dst, .dst = claimed->addr, .sport = out->dport, .proto = out->proto, .kind = NAT_IN};
	struct nat_entry back = {.addr = out->src, .port = out->sport};
	__u32 range = cfg_nat_port_max - cfg_nat_port_min + 1;
	int i;

#pragma clang loop unroll(disable)
	for (i = 0; i < NAT_TRIES; i++) {
		/* Anywhere each time: steps of one length lead along what earlier claims took by the same steps. */
		in.dport = bpf_htons(cfg_nat_port_min + bpf_get_prandom_u32() % range);
		if (bpf_map_update_elem(&nat, &in, &back, BPF_NOEXIST))
			continue;
		claimed->port = in.dport;
		if (!bpf_map_update_elem(&nat, out, claimed, BPF_NOEXIST)) {
			metric_add(METRIC_NAT_CLAIMED, 1, 0);
			return 0;
		}
		bpf_map_delete_elem(&nat, &in); /* another CPU claimed one for the same connection */
		return CT_RETRY;
	}
	return DROP_NO_NAT_PORT;
}

/* nat_find returns the claim of a connection that has both of its rows: the map forgets the longest unused row,
 * whichever it is. */
static __always_inline struct nat_entry *nat_find(const struct nat_key *out)
{
	struct nat_entry *found = bpf_map_lookup_elem(&nat, out), *back;
	struct nat_key in = {.src = out->dst, .sport = out->dport, .proto = out->proto, .kind = NAT_IN};

	if (!found)
		return NULL;
	in.dst = found->addr;
	in.dport = found->port;
	back = bpf_map_lookup_elem(&nat, &in);
	if (back && back->port == out->sport && addr_equal(&back->addr, &out->src))
		return found;
	bpf_map_delete_elem(&nat, out);
	return NULL;
}

/* nat_release gives the claim of a connection back. */
static __always_inline void nat_release(const struct nat_key *out)
{
	struct nat_entry *found = bpf_map_lookup_elem(&nat, out);
	struct nat_key in = {.src = out->dst, .sport = out->dport, .proto = out->proto, .kind = NAT_IN};

	if (!found)
		return;
	in.dst = found->addr;
	in.dport = found->port;
	bpf_map_delete_elem(&nat, &in);
	bpf_map_delete_elem(&nat, out);
}

/* inner is the packet that an ICMP error is about. */
struct inner {
	struct addr src;
	struct addr dst;
	__be16 sport;
	__be16 dport;
	__u8 proto;
	__u8 icmp;
	__u32 l3;
	__u32 l4;
};

static __always_inline bool inner_read(struct __sk_buff *skb, const struct packet *p, struct inner *in)
{
	__be16 l4[4];

	in->l3 = p->l4 + 8;
	if (p->v4) {
		struct iphdr ip;

		if (bpf_skb_load_bytes(skb, in->l3, &ip, sizeof(ip)) || ip.ihl < 5)
			return false;
		addr_from_v4(&in->src, ip.saddr);
		addr_from_v4(&in->dst, ip.daddr);
		in->proto = ip.protocol;
		in->l4 = in->l3 + ip.ihl * 4;
	} else {
		struct ipv6hdr ip;

		if (bpf_skb_load_bytes(skb, in->l3, &ip, sizeof(ip)))
			return false;
		in->src.hi = ip.saddr[0];
		in->src.lo = ip.saddr[1];
		in->dst.hi = ip.daddr[0];
		in->dst.lo = ip.daddr[1];
		in->proto = ip.nexthdr;
		in->l4 = in->l3 + sizeof(ip);
	}
	/* Eight bytes of the inner L4 header are all that an error must carry. */
	if (bpf_skb_load_bytes(skb, in->l4, l4, sizeof(l4)))
		return false;
	in->icmp = in->proto == IPPROTO_ICMP || in->proto == IPPROTO_ICMPV6;
	if (in->icmp) {
		__u8 type = *(__u8 *)l4;
		bool request = type == 8 || type == 128;

		in->sport = request ? l4[2] : 0;
		in->dport = request ? 0 : l4[2];
	} else {
		in->sport = l4[0];
		in->dport = l4[1];
	}
	return true;
}

/* inner_rewrite replaces the inner packet's source or destination. The inner IPv4 header's own checksum takes up the
 * change of address, so that only the port changes the ICMP checksum; an inner IPv6 address changes it too. */
static __always_inline int inner_rewrite(struct __sk_buff *skb, const struct packet *p, struct inner *in, bool source,
					 struct addr *now, __be16 port)
{
	struct addr *old = source ? &in->src : &in->dst;
	__be16 was = source ? in->sport : in->dport;
	__u32 checksum = p->l4 + 2, offset = in->l4 + (in->icmp ? 4 : source ? 0 : 2);

	if (p->v4) {
		__be32 a = addr_v4(old), b = addr_v4(now);

		if (bpf_l3_csum_replace(skb, in->l3 + 10, a, b, 4) ||
		    bpf_skb_store_bytes(skb, in->l3 + (source ? 12 : 16), &b, 4, 0))
			return DROP_WRITE_ERROR;
	} else {
		__s64 diff = bpf_csum_diff((__be32 *)old, sizeof(*old), (__be32 *)now, sizeof(*now), 0);

		if (bpf_l4_csum_replace(skb, checksum, 0, diff, 0) ||
		    bpf_skb_store_bytes(skb, in->l3 + (source ? 8 : 24), now, sizeof(*now), 0))
			return DROP_WRITE_ERROR;
	}
	if (was != port) {
		if (bpf_l4_csum_replace(skb, checksum, was, port, 2) || bpf_skb_store_bytes(skb, offset, &port, 2, 0))
			return DROP_WRITE_ERROR;
	}
	return 0;
}

/* nat_out_error translates an ICMP error that a pod sends about a packet which came in by a claim. */
__noinline int nat_out_error(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();
	struct inner in = {};
	struct nat_key out = {.kind = NAT_OUT};
	struct nat_entry *found;
	struct addr node;
	__be16 port;
	int reason;

	if (!s || !inner_read(skb, &s->packet, &in))
		return 0;
	out.src = in.dst;
	out.dst = in.src;
	out.sport = in.dport;
	out.dport = in.sport;
	out.proto = in.proto;
	found = nat_find(&out);
	if (!found)
		return 0; /* about a connection that is not masqueraded */
	node = found->addr;
	port = found->port;
	reason = inner_rewrite(skb, &s->packet, &in, false, &node, port);
	return reason ? reason : nat_address(skb, &s->packet, true, &node);
}

/* nat_out gives a pod's packet, which is in scratch, the node's address and a claimed port: 0 or a drop reason. */
__noinline int nat_out(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();
	struct nat_key out = {.kind = NAT_OUT};
	struct nat_entry claimed = {}, *found;
	struct packet *p;
	int i, reason;

	if (!s)
		return DROP_WRITE_ERROR;
	p = &s->packet;
	if (p->icmp_error)
		return nat_out_error(skb);
	if (p->kind && p->kind != KIND_TIMESTAMP)
		return DROP_NAT_PROTOCOL;
	out.src = p->src;
	out.dst = p->dst;
	out.sport = p->sport;
	out.dport = p->dport;
	out.proto = p->proto;
	node_address(&claimed.addr, p->v4);
#pragma clang loop unroll(disable)
	for (i = 0; i < 2; i++) {
		found = nat_find(&out);
		if (found) {
			claimed = *found;
			break;
		}
		reason = nat_claim(&out, &claimed);
		if (!reason)
			break;
		if (reason != CT_RETRY)
			return reason;
	}
	if (i == 2)
		return DROP_NO_NAT_PORT;
	reason = nat_port(skb, p, true, claimed.port);
	return reason ? reason : nat_address(skb, p, true, &claimed.addr);
}

/* nat_in_error translates an ICMP error about a masqueraded packet. */
__noinline int nat_in_error(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();
	struct inner in = {};
	struct nat_key key = {.kind = NAT_IN};
	struct nat_entry *found;
	struct addr pod;
	__be16 port;
	int reason;

	if (!s || !inner_read(skb, &s->packet, &in))
		return NAT_NOT_OURS;
	key.src = in.dst;
	key.dst = in.src;
	key.sport = in.dport;
	key.dport = in.sport;
	key.proto = in.proto;
	found = bpf_map_lookup_elem(&nat, &key);
	if (!found)
		return NAT_NOT_OURS;
	pod = found->addr;
	port = found->port;
	reason = inner_rewrite(skb, &s->packet, &in, true, &pod, port);
	if (!reason)
		reason = nat_address(skb, &s->packet, false, &pod);
	return reason ? reason : NAT_TRANSLATED;
}

/* nat_in turns an answer to the node's address, which is in scratch, into the pod's or client's: NAT_NOT_OURS,
 * NAT_TRANSLATED or a drop reason. */
__noinline int nat_in(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();
	struct nat_key key = {.kind = NAT_IN};
	struct nat_entry *found;
	struct addr pod;
	struct packet *p;
	__u32 port;
	__be16 to;
	int reason;

	if (!s)
		return NAT_NOT_OURS;
	p = &s->packet;
	if (p->icmp_error)
		return nat_in_error(skb);
	port = bpf_ntohs(p->dport);
	if ((p->kind && p->kind != KIND_TIMESTAMP) || port < cfg_nat_port_min || port > cfg_nat_port_max)
		return NAT_NOT_OURS;
	key.src = p->src;
	key.dst = p->dst;
	key.sport = p->sport;
	key.dport = p->dport;
	key.proto = p->proto;
	found = bpf_map_lookup_elem(&nat, &key);
	if (!found)
		return NAT_NOT_OURS;
	pod = found->addr;
	to = found->port;
	reason = nat_port(skb, p, false, to);
	if (!reason)
		reason = nat_address(skb, p, false, &pod);
	return reason ? reason : NAT_TRANSLATED;
}

#endif
