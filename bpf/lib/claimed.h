/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Answers to connections that have a claimed port of this node: of pods that were masqueraded, and of clients outside
 * that were forwarded to a service's backend on another node. */
#ifndef WEIR_CLAIMED_H
#define WEIR_CLAIMED_H

#include "deliver.h"

/* inbound_claimed turns round the packet in scratch, which came to the node's own address and is parsed: true when
 * *verdict says what becomes of it. */
static __always_inline bool inbound_claimed(struct __sk_buff *skb, struct scratch *s, int *verdict)
{
	struct endpoint *dst;
	int found;

	found = nat_in(skb);
	if (found == NAT_NOT_OURS)
		return false;
	dst = endpoint_find(&s->packet.dst);
	if (found == NAT_TRANSLATED) {
		if (dst) {
			if (proxy_answers(skb))
				*verdict = proxy_take(skb);
			else
				*verdict = deliver(skb, s, dst, NULL, DELIVER_FROM_UPLINK);
			return true;
		}
		found = lb_answer(skb, &s->packet);
		if (found == LB_TRANSLATED) {
			*verdict = lb_send(skb);
			if (*verdict >= 0)
				return true;
			found = -*verdict;
		}
	}
	inbound_fault(s, dst);
	*verdict = drop(skb, found ?: DROP_UNROUTABLE);
	return true;
}

#endif
