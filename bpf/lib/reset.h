/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Ending a TCP connection in both its ends' names, by one of its packets. */
#ifndef WEIR_RESET_H
#define WEIR_RESET_H

#include "answer.h"
#include "tunnel.h"

#define TCP_BARE sizeof(struct tcphdr)

static __always_inline __u16 reset_sum16(__u64 sum)
{
	return ~answer_fold(sum);
}

/* reset_pseudo sums the pseudo header of TCP. */
static __always_inline __s64 reset_pseudo(const struct packet *p, __u32 length)
{
	__be32 rest[2] = {bpf_htonl(length), bpf_htonl(IPPROTO_TCP)};
	__s64 sum = bpf_csum_diff(NULL, 0, rest, sizeof(rest), 0);

	/* A mapped IPv4 address has one word more, 0xffff, which is 0 to this sum. */
	sum = bpf_csum_diff(NULL, 0, (__be32 *)&p->src, sizeof(p->src), sum);
	return bpf_csum_diff(NULL, 0, (__be32 *)&p->dst, sizeof(p->dst), sum);
}

/* reset_trim takes data and options from the TCP packet in scratch, headers' lengths included. partial: its checksum is
 * that of the pseudo header alone, and the device makes the rest; nothing but the checksum itself says so. */
static __always_inline bool reset_trim(struct __sk_buff *skb, struct packet *p, bool *partial)
{
	__be16 was = bpf_htons((__u16)p->length), is;
	__u32 length = p->l4 - ETH_HLEN + TCP_BARE;
	__u16 check;

	if (bpf_skb_load_bytes(skb, p->l4 + 16, &check, 2))
		return false;
	*partial = check == reset_sum16(reset_pseudo(p, p->length + ETH_HLEN - p->l4));
	if (bpf_skb_change_tail(skb, ETH_HLEN + length, 0))
		return false;
	if (p->v4) {
		is = bpf_htons(length);
		if (bpf_skb_load_bytes(skb, ETH_HLEN + 2, &was, 2) ||
		    bpf_l3_csum_replace(skb, ETH_HLEN + 10, was, is, 2) ||
		    bpf_skb_store_bytes(skb, ETH_HLEN + 2, &is, 2, BPF_F_RECOMPUTE_CSUM))
			return false;
	} else {
		is = bpf_htons(length - sizeof(struct ipv6hdr));
		if (bpf_skb_store_bytes(skb, ETH_HLEN + 4, &is, 2, BPF_F_RECOMPUTE_CSUM))
			return false;
	}
	p->length = p->bytes = length;
	p->segments = 1;
	return true;
}

/* reset_write makes the trimmed packet a reset: to its receiver, or back to its sender. */
static __always_inline bool reset_write(struct __sk_buff *skb, const struct packet *p, bool partial, bool back)
{
	struct tcphdr tcp = {.doff = 5, .flags = TCP_RST};
	bool has_ack = p->tcp_flags & TCP_ACK;
	__s64 sum = reset_pseudo(p, TCP_BARE);
	const struct addr *src = back ? &p->dst : &p->src, *dst = back ? &p->src : &p->dst;

	tcp.source = back ? p->dport : p->sport;
	tcp.dest = back ? p->sport : p->dport;
	if (!back) {
		tcp.seq = bpf_htonl(p->seq);
		if (has_ack) {
			tcp.ack_seq = bpf_htonl(p->ack);
			tcp.flags |= TCP_ACK;
		}
	} else if (has_ack) {
		tcp.seq = bpf_htonl(p->ack);
	} else {
		tcp.ack_seq = bpf_htonl(p->seq + p->payload + !!(p->tcp_flags & TCP_SYN) + !!(p->tcp_flags & TCP_FIN));
		tcp.flags |= TCP_ACK;
	}
	if (partial)
		tcp.check = reset_sum16(sum);
	else
		tcp.check = answer_fold(bpf_csum_diff(NULL, 0, (__be32 *)&tcp, sizeof(tcp), sum));
	if (bpf_skb_store_bytes(skb, p->l4, &tcp, sizeof(tcp), BPF_F_RECOMPUTE_CSUM))
		return false;
	if (p->v4) {
		__be32 ends[2] = {addr_v4(src), addr_v4(dst)};

		return !bpf_skb_store_bytes(skb, ETH_HLEN + 12, ends, sizeof(ends), BPF_F_RECOMPUTE_CSUM);
	}
	return !bpf_skb_store_bytes(skb, ETH_HLEN + 8, src, sizeof(*src), BPF_F_RECOMPUTE_CSUM) &&
	       !bpf_skb_store_bytes(skb, ETH_HLEN + 24, dst, sizeof(*dst), BPF_F_RECOMPUTE_CSUM);
}

static __always_inline bool reset_swap_mac(struct __sk_buff *skb)
{
	__u8 dst[6], src[6];

	return !bpf_skb_load_bytes(skb, 0, dst, 6) && !bpf_skb_load_bytes(skb, 6, src, 6) &&
	       !bpf_skb_store_bytes(skb, 0, src, 6, 0) && !bpf_skb_store_bytes(skb, 6, dst, 6, 0);
}

/* reset_way prepares a packet that goes back to where it came from. */
static __always_inline bool reset_way(struct __sk_buff *skb, struct scratch *s)
{
	if (!reset_swap_mac(skb))
		return false;
	if (s->packet.tunnel_identity &&
	    (overlay_key(skb, &s->packet.tunnel_node, s->pass.self_identity) || overlay_mac(skb)))
		return false;
	/* A socket here may have any address. */
	skb->mark = (skb->mark & ~MARK_MASK) | (s->pass.from_host ? MARK_PROXY : MARK_DELIVERED);
	return true;
}

/* reset_sender answers the TCP packet in scratch with a reset, by the way that it came: a verdict. */
__noinline int reset_sender(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();
	struct packet *p;
	bool partial;

	if (!s)
		return TC_ACT_SHOT;
	p = &s->packet;
	if (p->proto != IPPROTO_TCP || p->fragment || (p->tcp_flags & TCP_RST))
		return TC_ACT_SHOT;
	if (!reset_trim(skb, p, &partial) || !reset_write(skb, p, partial, true) || !reset_way(skb, s))
		return TC_ACT_SHOT;
	skb->cb[0] = skb->ifindex; /* seen by tests */
	return bpf_redirect(skb->ifindex, 0);
}

/* reset_both answers the TCP packet in scratch with a reset, and makes one for its receiver of the packet itself, which
 * then goes on: 0, or not when it is to be dropped. */
__noinline int reset_both(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();
	__u32 mark = skb->mark;
	struct packet *p;
	bool partial;

	if (!s)
		return 1;
	p = &s->packet;
	if (p->proto != IPPROTO_TCP || p->fragment || (p->tcp_flags & TCP_RST))
		return 1;
	if (!reset_trim(skb, p, &partial) || !reset_write(skb, p, partial, true) || !reset_way(skb, s))
		return 1;
	bpf_clone_redirect(skb, skb->ifindex, 0);
	skb->mark = mark;
	if (!reset_swap_mac(skb) || !reset_write(skb, p, partial, false))
		return 1;
	p->payload = 0;
	p->tcp_flags = (p->tcp_flags & TCP_ACK) | TCP_RST;
	p->starts = 0;
	return 0;
}

#endif
