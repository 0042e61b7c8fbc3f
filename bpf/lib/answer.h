/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Answering in place of somebody who is not there. */
#ifndef WEIR_ANSWER_H
#define WEIR_ANSWER_H

#include "config.h"
#include "scratch.h"

#define ANSWER_V4 28 /* IPv4 header and 8 bytes: what an error must carry */
#define ANSWER_V6 48

struct icmp_error4 {
	struct iphdr ip;
	__u8 type;
	__u8 code;
	__sum16 check;
	__be16 unused;
	__be16 mtu;
};

struct icmp_error6 {
	struct ipv6hdr ip;
	__u8 type;
	__u8 code;
	__sum16 check;
	__be32 mtu;
};

static __always_inline __sum16 answer_fold(__u64 sum)
{
	sum = (sum & 0xffff) + (sum >> 16 & 0xffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

/* answer_v4 and answer_v6 make room in front of the packet's first bytes and write the error there, from the packet's
 * destination to its source. */
static __always_inline bool answer_v4(struct __sk_buff *skb, const struct packet *p, __u8 type, __u8 code, __u16 mtu)
{
	struct icmp_error4 e = {};
	__be32 inner[ANSWER_V4 / 4];
	__s64 sum;

	if (p->l4 != ETH_HLEN + sizeof(struct iphdr) || bpf_skb_load_bytes(skb, ETH_HLEN, inner, sizeof(inner)))
		return false;
	e.type = type;
	e.code = code;
	e.mtu = bpf_htons(mtu);
	sum = bpf_csum_diff(NULL, 0, inner, sizeof(inner), 0);
	sum = bpf_csum_diff(NULL, 0, (__be32 *)&e.type, 8, sum);
	e.check = answer_fold(sum);
	e.ip.version = 4;
	e.ip.ihl = 5;
	e.ip.tot_len = bpf_htons(sizeof(e) + sizeof(inner));
	e.ip.ttl = 64;
	e.ip.protocol = IPPROTO_ICMP;
	e.ip.saddr = addr_v4(&p->dst);
	e.ip.daddr = addr_v4(&p->src);
	e.ip.check = answer_fold(bpf_csum_diff(NULL, 0, (__be32 *)&e.ip, sizeof(e.ip), 0));
	return !bpf_skb_change_tail(skb, ETH_HLEN + sizeof(inner), 0) &&
	       !bpf_skb_adjust_room(skb, sizeof(e), BPF_ADJ_ROOM_MAC, 0) &&
	       !bpf_skb_store_bytes(skb, ETH_HLEN, &e, sizeof(e), 0);
}

static __always_inline bool answer_v6(struct __sk_buff *skb, const struct packet *p, __u8 type, __u8 code, __u32 mtu)
{
	struct icmp_error6 e = {};
	__be32 inner[ANSWER_V6 / 4];
	__be32 pseudo[2] = {bpf_htonl(8 + sizeof(inner)), bpf_htonl(IPPROTO_ICMPV6)};
	__s64 sum;

	if (bpf_skb_load_bytes(skb, ETH_HLEN, inner, sizeof(inner)))
		return false;
	e.type = type;
	e.code = code;
	e.mtu = bpf_htonl(mtu);
	e.ip.version = 6;
	e.ip.payload_len = bpf_htons(8 + sizeof(inner));
	e.ip.nexthdr = IPPROTO_ICMPV6;
	e.ip.hop_limit = 64;
	e.ip.saddr[0] = p->dst.hi;
	e.ip.saddr[1] = p->dst.lo;
	e.ip.daddr[0] = p->src.hi;
	e.ip.daddr[1] = p->src.lo;
	sum = bpf_csum_diff(NULL, 0, inner, sizeof(inner), 0);
	sum = bpf_csum_diff(NULL, 0, (__be32 *)&e.type, 8, sum);
	sum = bpf_csum_diff(NULL, 0, (__be32 *)&p->dst, sizeof(p->dst), sum);
	sum = bpf_csum_diff(NULL, 0, (__be32 *)&p->src, sizeof(p->src), sum);
	sum = bpf_csum_diff(NULL, 0, pseudo, sizeof(pseudo), sum);
	e.check = answer_fold(sum);
	return !bpf_skb_change_tail(skb, ETH_HLEN + sizeof(inner), 0) &&
	       !bpf_skb_adjust_room(skb, sizeof(e), BPF_ADJ_ROOM_MAC, 0) &&
	       !bpf_skb_store_bytes(skb, ETH_HLEN, &e, sizeof(e), 0);
}

/* answer_reset turns a TCP packet without data into the reset that its receiver would send. Every change goes through
 * the checksum helpers: the checksum may not be made yet, and only they know. Swapping does not change it. */
static __always_inline bool answer_reset(struct __sk_buff *skb, const struct packet *p)
{
	__u32 checksum = p->l4 + 16;
	__be32 seq, ack;
	struct tcphdr tcp;
	__be16 was, is, none = 0;

	if (p->payload || (p->tcp_flags & TCP_RST) || bpf_skb_load_bytes(skb, p->l4, &tcp, sizeof(tcp)))
		return false;
	seq = ack = 0;
	if (p->tcp_flags & TCP_ACK)
		seq = tcp.ack_seq;
	else
		ack = bpf_htonl(p->seq + !!(p->tcp_flags & TCP_SYN) + !!(p->tcp_flags & TCP_FIN));
	is = bpf_htons((__u16)tcp.doff << 12 | (ack ? TCP_RST | TCP_ACK : TCP_RST));
	if (bpf_skb_load_bytes(skb, p->l4 + 12, &was, 2) || bpf_l4_csum_replace(skb, checksum, tcp.seq, seq, 4) ||
	    bpf_l4_csum_replace(skb, checksum, tcp.ack_seq, ack, 4) || bpf_l4_csum_replace(skb, checksum, was, is, 2) ||
	    bpf_l4_csum_replace(skb, checksum, tcp.window, none, 2) ||
	    bpf_skb_store_bytes(skb, p->l4, &tcp.dest, 2, 0) ||
	    bpf_skb_store_bytes(skb, p->l4 + 2, &tcp.source, 2, 0) || bpf_skb_store_bytes(skb, p->l4 + 4, &seq, 4, 0) ||
	    bpf_skb_store_bytes(skb, p->l4 + 8, &ack, 4, 0) || bpf_skb_store_bytes(skb, p->l4 + 12, &is, 2, 0) ||
	    bpf_skb_store_bytes(skb, p->l4 + 14, &none, 2, 0))
		return false;
	if (p->v4) {
		__be32 src = addr_v4(&p->dst), dst = addr_v4(&p->src);

		return !bpf_skb_store_bytes(skb, ETH_HLEN + 12, &src, 4, 0) &&
		       !bpf_skb_store_bytes(skb, ETH_HLEN + 16, &dst, 4, 0);
	}
	return !bpf_skb_store_bytes(skb, ETH_HLEN + 8, &p->dst, 16, 0) &&
	       !bpf_skb_store_bytes(skb, ETH_HLEN + 24, &p->src, 16, 0);
}

/* answer_unreachable tells the sender of the packet in scratch that its port is unreachable, by the way that the packet
 * came: with a TCP reset, else with an ICMP error. */
__noinline int answer_unreachable(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();
	__u8 dst[6], src[6];
	struct packet *p;
	bool made;

	if (!s)
		return TC_ACT_SHOT;
	p = &s->packet;
	if (p->fragment || p->segments > 1)
		return TC_ACT_SHOT;
	if (p->proto == IPPROTO_TCP)
		made = answer_reset(skb, p);
	else if (p->v4)
		made = answer_v4(skb, p, 3, 3, 0);
	else
		made = answer_v6(skb, p, 1, 4, 0);
	if (!made || bpf_skb_load_bytes(skb, 0, dst, 6) || bpf_skb_load_bytes(skb, 6, src, 6) ||
	    bpf_skb_store_bytes(skb, 0, src, 6, 0) || bpf_skb_store_bytes(skb, 6, dst, 6, 0))
		return TC_ACT_SHOT;
	skb->mark = (skb->mark & ~MARK_MASK) | MARK_DELIVERED;
	skb->cb[0] = skb->ifindex; /* seen by tests */
	return bpf_redirect(skb->ifindex, 0);
}

#endif
