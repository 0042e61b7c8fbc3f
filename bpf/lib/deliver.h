/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Bringing a packet to a local endpoint: the one way, from every hook. */
#ifndef WEIR_DELIVER_H
#define WEIR_DELIVER_H

#include "ct.h"
#include "drop.h"
#include "lb.h"

/* deliver counts the packet in scratch at dst's observation point and hands it over. src is the sending endpoint of
 * this node, or NULL. */
static __always_inline int deliver(struct __sk_buff *skb, struct scratch *s, const struct endpoint *dst,
				   const struct endpoint *src, bool from_uplink)
{
	struct pass *o = &s->pass;
	__u32 ifindex = dst->ifindex;
	int reason;

	__builtin_memset(o, 0, sizeof(*o));
	o->self_identity = dst->identity;
	o->ifindex = ifindex;
	o->endpoint = dst->id;
	o->from_uplink = from_uplink;
	if (src) {
		o->local_peer = 1;
		o->peer_identity = src->identity;
		o->peer = endpoint_peer(src);
		o->hairpin = src->id == dst->id;
	}
	o->translated = s->packet.translated && !src;
	reason = ct_update(skb);
	if (!reason && lb_is_answer(s)) {
		reason = lb_answer(skb, &s->packet);
		if (reason == LB_TRANSLATED)
			reason = 0;
	}
	if (reason)
		return drop(skb, reason);
	skb->cb[0] = ifindex; /* seen by tests; nothing in the kernel reads it */
	return bpf_redirect_peer(ifindex, 0);
}

/* inbound_fault names the endpoint that a packet would have been delivered to, for its drop. */
static __always_inline void inbound_fault(struct scratch *s, const struct endpoint *dst)
{
	struct pass *o = &s->pass;

	__builtin_memset(o, 0, sizeof(*o));
	if (dst) {
		o->self_identity = dst->identity;
		o->ifindex = dst->ifindex;
		o->endpoint = dst->id;
	}
}

#endif
