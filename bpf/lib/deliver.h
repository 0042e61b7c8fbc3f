/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Bringing a packet to a local endpoint: the one way, from every hook. */
#ifndef WEIR_DELIVER_H
#define WEIR_DELIVER_H

#include "ct.h"
#include "drop.h"
#include "lb.h"
#include "proxy.h"

/* How a packet comes to a local endpoint. */
#define DELIVER_FROM_UPLINK 1
#define DELIVER_FROM_HOST   2 /* the node's stack sends it, the proxy's accepted sockets among it */
#define DELIVER_UPSTREAM    4 /* an upstream socket of the proxy sends it */
#define DELIVER_UNASKED	    8 /* and the endpoint's ingress rules have been asked */

/* deliver counts the packet in scratch at dst's observation point and hands it over. src is the sending endpoint of
 * this node, or NULL. */
static __always_inline int deliver(struct __sk_buff *skb, struct scratch *s, const struct endpoint *dst,
				   const struct endpoint *src, __u32 how)
{
	struct pass *o = &s->pass;
	__u32 ifindex = dst->ifindex;
	int reason;

	__builtin_memset(o, 0, sizeof(*o));
	o->self_identity = dst->identity;
	o->ifindex = ifindex;
	o->endpoint = dst->id;
	o->from_uplink = !!(how & DELIVER_FROM_UPLINK);
	o->from_host = !!(how & (DELIVER_FROM_HOST | DELIVER_UPSTREAM));
	o->upstream = !!(how & DELIVER_UPSTREAM);
	o->unasked = !!(how & DELIVER_UNASKED);
	if (src) {
		o->local_peer = 1;
		o->peer_identity = src->identity;
		o->peer = endpoint_peer(src);
		o->hairpin = src->id == dst->id;
	}
	o->translated = s->packet.translated && !src;
	reason = ct_update(skb);
	if (reason == CT_UNTRACKED)
		reason = 0;
	if (reason == DROP_SLOT_CHANGED) {
		if (proxy_moved(skb, &s->packet))
			return TC_ACT_SHOT;
		reason = 0;
	}
	if (!reason && proxy_on_slot(s))
		return proxy_redirect(skb);
	if (!reason && proxy_past(s) && !o->from_host)
		reason = DROP_NO_LISTENER;
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
