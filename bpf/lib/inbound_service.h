/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What comes to a service from other machines. */
#ifndef WEIR_INBOUND_SERVICE_H
#define WEIR_INBOUND_SERVICE_H

#include "answer.h"
#include "overlay.h"

/* inbound_forward brings the packet in scratch, which lb_inbound has translated, to a backend on another machine. It
 * gets the node's address, so that the answers come back here: a verdict, or minus a drop reason. */
static __always_inline int inbound_forward(struct __sk_buff *skb, struct scratch *s)
{
	struct ipcache_entry *found;
	int reason = nat_out(skb);

	if (reason)
		return -reason;
	found = cfg_tunnel_ifindex ? ipcache_find(&s->packet.dst) : NULL;
	if (!found || addr_is_zero(&found->node))
		return lb_send(skb);
	__builtin_memset(&s->pass, 0, sizeof(s->pass));
	s->pass.self_identity = IDENTITY_REMOTE_NODE; /* what this node is to others */
	reason = lb_hop(skb, &s->packet);
	if (!reason)
		reason = overlay_send(skb);
	return reason == TC_ACT_REDIRECT ? reason : -reason;
}

/* inbound_service handles the packet in scratch, which is parsed: true when *verdict says what becomes of it. */
static __always_inline bool inbound_service(struct __sk_buff *skb, struct scratch *s, int *verdict)
{
	struct packet *p = &s->packet;
	struct endpoint *dst;
	int reason;

	reason = lb_inbound(skb);
	if (!reason)
		return false;
	if (reason == LB_TRANSLATED) {
		dst = endpoint_find(&p->dst);
		if (dst) {
			*verdict = deliver(skb, s, dst, NULL, DELIVER_FROM_UPLINK);
			return true;
		}
		if (host_owns(&p->dst)) {
			*verdict = host_inbound(skb, 0); /* to_network sees the answers */
			return true;
		}
		*verdict = inbound_forward(skb, s);
		if (*verdict >= 0)
			return true;
		reason = -*verdict;
	}
	inbound_fault(s, NULL);
	*verdict = drop(skb, reason);
	if (p->translated == TRANSLATED_REFUSED)
		*verdict = answer_unreachable(skb);
	return true;
}

/* outbound_answer gives an answer of this node's processes, as backends of a service, the service's address: 0 or a
 * drop reason. */
static __always_inline int outbound_answer(struct __sk_buff *skb, struct scratch *s)
{
	const volatile struct addr *node;
	struct packet *p = &s->packet;
	__u32 zero = 0, *sets = bpf_map_lookup_elem(&lb_host, &zero);
	int reason;

	if (!sets || !*sets || (skb->protocol != bpf_htons(ETH_P_IP) && skb->protocol != bpf_htons(ETH_P_IPV6)))
		return 0;
	reason = packet_l3(skb);
	node = p->v4 ? &cfg_node_v4 : &cfg_node_v6;
	if (reason || p->src.hi != node->hi || p->src.lo != node->lo)
		return 0;
	if ((p->fragment != FRAGMENT_LATER && packet_l4(skb)) || (p->fragment && frags_resolve()))
		return 0;
	reason = lb_answer(skb, p);
	return reason > 0 ? reason : 0;
}

#endif
