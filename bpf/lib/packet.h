/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Reading a packet. Everything that later steps need of it is put into struct packet, once. */
#ifndef WEIR_PACKET_H
#define WEIR_PACKET_H

#include "config.h"
#include "drop_types.h"
#include "record.h"

#define TCP_FIN 1
#define TCP_SYN 2
#define TCP_RST 4
#define TCP_ACK 16

#define IP_MF	       0x2000
#define IP_OFFSET      0x1fff
#define MAX_EXTENSIONS 6

enum fragment {
	FRAGMENT_NO = 0,
	FRAGMENT_FIRST = 1,
	FRAGMENT_LATER = 2,
};

/* kind of a ct_key. */
enum kind {
	KIND_CONNECTION = 0,
	KIND_ICMP = 1,	    /* ICMP that is not echo */
	KIND_HAIRPIN = 2,   /* a pod and the service that led back to it */
	KIND_TIMESTAMP = 3, /* ICMP timestamps, whose identifiers are not those of echoes */
};

enum translated {
	TRANSLATED_NO = 0,
	TRANSLATED_FORWARD = 1, /* from a service to its backend */
	TRANSLATED_REFUSED = 2, /* the service has no backend at all */
};

struct packet {
	struct addr src;
	struct addr dst;
	__u64 now;
	__u32 length;	/* IP length of what passed */
	__u32 segments; /* it stands for on the wire */
	__u32 bytes;	/* IP length of these together */
	__u32 l4;	/* offset of the L4 header */
	__u32 payload;	/* bytes behind the TCP header */
	__u32 seq;	/* host order */
	__u32 ack;
	__u32 fragment_id;
	__be16 sport; /* as conntrack has them: see struct ct_key for ICMP */
	__be16 dport;
	__u8 proto;
	__u8 kind; /* as in struct ct_key */
	__u8 tcp_flags;
	__u8 icmp_type;
	__u8 icmp_code;
	__u8 chunk;    /* type of the first SCTP chunk */
	__u8 fragment; /* enum fragment */
	__u8 ttl;
	__u8 v4;
	__u8 starts; /* begins a connection: TCP SYN, SCTP INIT */
	__u8 icmp_error;
	__u8 translated; /* enum translated */
	__u32 cpu;
	__u32 tunnel_identity;	 /* who sends it, as the tunnel says; 0 = it came by none */
	__u32 service;		 /* to which it went before it was translated */
	struct addr tunnel_node; /* that sent it */
};

static __always_inline int packet_v4(struct __sk_buff *skb, struct packet *p)
{
	struct iphdr ip;
	__u32 room = skb->len - ETH_HLEN;
	__u32 fragment;

	if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof(ip)))
		return DROP_INVALID_PACKET;
	addr_from_v4(&p->src, ip.saddr);
	addr_from_v4(&p->dst, ip.daddr);
	p->v4 = 1;
	p->proto = ip.protocol;
	p->ttl = ip.ttl;
	if (ip.version != 4 || ip.ihl < 5)
		return DROP_INVALID_PACKET;
	p->l4 = ETH_HLEN + ip.ihl * 4;
	p->length = bpf_ntohs(ip.tot_len);
	if (!p->length) /* a GSO packet above 64 KiB has none */
		p->length = room;
	if (p->length > room || p->length + ETH_HLEN < p->l4)
		return DROP_INVALID_PACKET;
	fragment = bpf_ntohs(ip.frag_off);
	if (fragment & (IP_MF | IP_OFFSET)) {
		p->fragment = fragment & IP_OFFSET ? FRAGMENT_LATER : FRAGMENT_FIRST;
		p->fragment_id = ip.id;
	}
	return 0;
}

static __always_inline int packet_v6(struct __sk_buff *skb, struct packet *p)
{
	struct ipv6hdr ip;
	__u32 room = skb->len - ETH_HLEN;
	__u32 offset = ETH_HLEN + sizeof(ip);
	__u8 next, ext[8];
	int i;

	if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof(ip)))
		return DROP_INVALID_PACKET;
	p->src.hi = ip.saddr[0];
	p->src.lo = ip.saddr[1];
	p->dst.hi = ip.daddr[0];
	p->dst.lo = ip.daddr[1];
	p->v4 = 0;
	p->ttl = ip.hop_limit;
	if (ip.version != 6)
		return DROP_INVALID_PACKET;
	p->length = bpf_ntohs(ip.payload_len) + sizeof(ip);
	if (p->length == sizeof(ip) && skb->gso_size) /* above 64 KiB */
		p->length = room;
	if (p->length > room)
		return DROP_INVALID_PACKET;
	next = ip.nexthdr;
#pragma clang loop unroll(disable)
	for (i = 0; i < MAX_EXTENSIONS; i++) {
		switch (next) {
		case IPPROTO_HOPOPTS:
		case IPPROTO_ROUTING:
		case IPPROTO_DSTOPTS:
		case IPPROTO_AH:
		case IPPROTO_FRAGMENT:
			break;
		default:
			goto found;
		}
		if (bpf_skb_load_bytes(skb, offset, ext, sizeof(ext)))
			return DROP_INVALID_EXTENSION;
		if (next == IPPROTO_FRAGMENT) {
			__u32 fragment = ((__u32)ext[2] << 8) | ext[3];

			if (fragment & 0xfff9) { /* an atomic fragment is a whole packet */
				p->fragment = fragment & 0xfff8 ? FRAGMENT_LATER : FRAGMENT_FIRST;
				p->fragment_id = *(__u32 *)&ext[4];
			}
			offset += 8;
		} else if (next == IPPROTO_AH) {
			offset += (ext[1] + 2) * 4;
		} else {
			offset += (ext[1] + 1) * 8;
		}
		next = ext[0];
		if (p->fragment == FRAGMENT_LATER)
			goto found; /* what follows is data */
	}
	p->proto = next;
	return DROP_INVALID_EXTENSION;
found:
	p->proto = next;
	p->l4 = offset;
	if (p->length + ETH_HLEN < offset)
		return DROP_INVALID_EXTENSION;
	return 0;
}

/* packet_none describes a packet that is neither IPv4 nor IPv6. */
static __always_inline void packet_none(struct __sk_buff *skb, struct packet *p)
{
	__builtin_memset(p, 0, sizeof(*p));
	p->now = bpf_ktime_get_ns();
	p->segments = 1;
	p->length = p->bytes = skb->len - ETH_HLEN;
}

/* packet_parse_l3 reads addresses, protocol and length. On a fault it returns the drop reason; what could be read is
 * there. */
static __always_inline int packet_parse_l3(struct __sk_buff *skb, struct packet *p)
{
	int reason;

	__builtin_memset(p, 0, sizeof(*p));
	p->now = bpf_ktime_get_ns();
	p->cpu = bpf_get_smp_processor_id();
	p->segments = 1;
	p->length = p->bytes = skb->len - ETH_HLEN;
	if (skb->protocol == bpf_htons(ETH_P_IP))
		reason = packet_v4(skb, p);
	else
		reason = packet_v6(skb, p);
	p->bytes = p->length;
	if (!reason && !p->ttl)
		reason = DROP_TTL_EXCEEDED;
	return reason;
}

/* packet_segments: a GSO packet stands for several, each with its own headers. */
static __always_inline void packet_segments(struct __sk_buff *skb, struct packet *p, __u32 l4_header)
{
	__u32 size = skb->gso_size, headers = p->l4 - ETH_HLEN + l4_header, segments;

	if (!size || p->length <= headers)
		return;
	segments = skb->gso_segs;
	if (!segments)
		segments = (p->length - headers + size - 1) / size;
	if (segments > 1) {
		p->segments = segments;
		p->bytes = p->length + (segments - 1) * headers;
	}
}

static __always_inline void packet_icmp_ports(struct packet *p, __u8 type, __u8 code, __be16 id)
{
	__u8 request, answer, error;

	if (p->proto == IPPROTO_ICMP) {
		request = type == 8 || type == 13;
		answer = type == 0 || type == 14;
		error = type == 3 || type == 4 || type == 5 || type == 11 || type == 12;
	} else {
		request = type == 128;
		answer = type == 129;
		error = type >= 1 && type <= 4;
	}
	if (p->proto == IPPROTO_ICMP && (type == 13 || type == 14))
		p->kind = KIND_TIMESTAMP;
	if (request) {
		p->sport = id;
	} else if (answer) {
		p->dport = id;
	} else {
		p->kind = KIND_ICMP;
		p->sport = 0xffff; /* both directions of type 0, code 0 would have one key */
		p->dport = bpf_htons((__u16)type << 8 | code);
		p->icmp_error = error;
	}
}

/* packet_parse_l4 reads ports, flags and the like of a packet that is no later fragment. */
static __always_inline int packet_parse_l4(struct __sk_buff *skb, struct packet *p)
{
	switch (p->proto) {
	case IPPROTO_TCP: {
		struct tcphdr tcp;
		__u32 header;

		if (bpf_skb_load_bytes(skb, p->l4, &tcp, sizeof(tcp)))
			return DROP_TRUNCATED;
		header = tcp.doff * 4;
		if (header < sizeof(tcp) || p->l4 + header > p->length + ETH_HLEN)
			return DROP_TRUNCATED;
		p->sport = tcp.source;
		p->dport = tcp.dest;
		p->seq = bpf_ntohl(tcp.seq);
		p->ack = bpf_ntohl(tcp.ack_seq);
		p->tcp_flags = tcp.flags;
		p->payload = p->length + ETH_HLEN - p->l4 - header;
		p->starts = (tcp.flags & (TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN)) == TCP_SYN;
		packet_segments(skb, p, header);
		return 0;
	}
	case IPPROTO_UDP: {
		struct udphdr udp;

		if (p->l4 + sizeof(udp) > p->length + ETH_HLEN || bpf_skb_load_bytes(skb, p->l4, &udp, sizeof(udp)))
			return DROP_TRUNCATED;
		p->sport = udp.source;
		p->dport = udp.dest;
		packet_segments(skb, p, sizeof(udp));
		return 0;
	}
	case IPPROTO_SCTP: {
		__be16 ports[2];

		if (p->l4 + 12 > p->length + ETH_HLEN || bpf_skb_load_bytes(skb, p->l4, ports, sizeof(ports)))
			return DROP_TRUNCATED;
		p->sport = ports[0];
		p->dport = ports[1];
		p->chunk = 0xff; /* a common header alone holds no chunk */
		if (p->l4 + 16 <= p->length + ETH_HLEN)
			bpf_skb_load_bytes(skb, p->l4 + 12, &p->chunk, 1);
		p->starts = p->chunk == 1;
		packet_segments(skb, p, 12);
		return 0;
	}
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6: {
		__u8 icmp[8];

		if ((p->proto == IPPROTO_ICMP) != p->v4)
			return DROP_UNKNOWN_L4;
		if (p->l4 + sizeof(icmp) > p->length + ETH_HLEN || bpf_skb_load_bytes(skb, p->l4, icmp, sizeof(icmp)))
			return DROP_TRUNCATED;
		p->icmp_type = icmp[0];
		p->icmp_code = icmp[1];
		packet_icmp_ports(p, icmp[0], icmp[1], *(__be16 *)&icmp[4]);
		return 0;
	}
	}
	return DROP_UNKNOWN_L4;
}

#endif
