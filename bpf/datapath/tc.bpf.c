// clang-format off
//go:build ignore
// clang-format on

// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// The tc programs: every packet of a pod passes one of them at an ingress hook. README.md says where each is attached.
#include "vmlinux.h"
#include "deliver.h"
#include "exported.h"
#include "frags.h"
#include "from_proxy.h"
#include "host.h"
#include "inbound_service.h"
#include "overlay.h"
#include "sweep.h"
#include "upgrade.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

// icmp6_control handles what keeps a link going rather than a connection: true when *verdict says what becomes of the
// packet, or *reason why it is dropped.
static __always_inline bool icmp6_control(const struct packet *p, int *verdict, int *reason)
{
	switch (p->icmp_type) {
	case 135: // neighbour solicitation
	case 136: // neighbour advertisement
		metric_add(METRIC_ND, 1, p->bytes);
		*verdict = TC_ACT_OK;
		return true;
	case 130: // multicast listener messages
	case 131:
	case 132:
	case 143:
	case 133: // router solicitation
		metric_add(METRIC_MULTICAST_CONTROL, 1, p->bytes);
		*verdict = TC_ACT_SHOT;
		return true;
	case 134: // router advertisement
	case 137: // redirect
		*reason = DROP_FORBIDDEN_ICMP6;
	}
	return false;
}

// local_peer finds the endpoint of this node that a pod's packet goes to, and notes it in scratch.
static __always_inline struct endpoint *local_peer(struct packet *p, struct pass *o, const struct endpoint *src)
{
	struct endpoint *dst = endpoint_find(&p->dst);

	if (dst) {
		o->local_peer = 1;
		o->peer_identity = dst->identity;
		o->peer = endpoint_peer(dst);
		o->hairpin = dst->id == src->id;
	}
	return dst;
}

// from_pod: everything that a pod sends, at the ingress of the host side of its veth pair.
SEC("tc")
int from_pod(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();
	struct endpoint *src = NULL, *dst = NULL;
	int reason, fault = 0, verdict;
	struct packet *p;
	struct pass *o;
	bool upstream;

	if (!s)
		return TC_ACT_SHOT;
	p = &s->packet;
	o = &s->pass;
	__builtin_memset(o, 0, sizeof(*o));
	o->sent = 1;
	o->ifindex = skb->ifindex;
	if (skb->protocol == bpf_htons(ETH_P_ARP)) {
		metric_add(METRIC_ARP, 1, skb->len);
		return TC_ACT_OK;
	}
	if (skb->protocol != bpf_htons(ETH_P_IP) && skb->protocol != bpf_htons(ETH_P_IPV6)) {
		packet_none(skb, p);
		reason = DROP_UNSUPPORTED_L3;
		goto refuse;
	}
	reason = packet_l3(skb);
	if (!reason && p->fragment != FRAGMENT_LATER)
		reason = packet_l4(skb);
	if (p->proto == IPPROTO_ICMPV6 && !p->v4 && !reason && icmp6_control(p, &verdict, &fault))
		return verdict;
	if (p->proto == IPPROTO_IGMP && p->v4) {
		metric_add(METRIC_MULTICAST_CONTROL, 1, p->bytes);
		return TC_ACT_SHOT;
	}
	src = endpoint_find(&p->src);
	if (!src || src->ifindex != skb->ifindex) {
		reason = DROP_INVALID_SOURCE_IP;
		src = NULL;
		goto refuse;
	}
	o->self_identity = src->identity;
	o->endpoint = src->id;
	if (!reason)
		reason = fault;
	if (!reason && p->fragment)
		reason = frags_resolve();
	if (reason)
		goto refuse;
	if (p->proto == IPPROTO_UDP && lb_moved(skb)) {
		reason = CT_TRANSLATE;
	} else if (p->icmp_error) {
		reason = lb_forward_error(skb);
		if (reason > 0)
			goto refuse;
	}
	if (reason != CT_TRANSLATE) {
		dst = local_peer(p, o, src);
		reason = ct_update(skb);
	}
	if (reason == CT_TRANSLATE) {
		reason = lb_outbound(skb);
		if (reason == LB_HAIRPIN_DONE) {
			skb->cb[0] = src->ifindex;
			return bpf_redirect_peer(src->ifindex, 0);
		}
		if (!reason) {
			dst = local_peer(p, o, src);
			reason = ct_update(skb);
		}
	}
	if (reason == DROP_SLOT_CHANGED) {
		if (proxy_moved(skb, p))
			return TC_ACT_SHOT;
		reason = 0;
	}
	if (!reason && proxy_past(s))
		reason = DROP_NO_LISTENER; // the pod never had the connection
	if (reason)
		goto refuse;
	if (proxy_on_slot(s))
		return o->point == POINT_TO_HOST && host_enforced() ? host_redirect(skb) : proxy_redirect(skb);
	upstream = (s->decision.flags & CT_UPSTREAM) && s->decision.d;
	// The node's own sockets may have such ports, and take what comes without help.
	if ((upstream || o->point != POINT_TO_HOST) && proxy_answers(skb))
		return proxy_take(skb);
	if (upstream)
		return proxy_lost(skb, p, s->decision.closed);
	if (dst)
		return deliver(skb, s, dst, src, 0);
	if (lb_is_answer(s)) {
		reason = lb_answer(skb, p);
		if (reason == LB_TRANSLATED) {
			reason = -lb_send(skb);
			if (reason <= 0)
				return -reason;
		}
		if (reason)
			goto refuse;
	}
	if (o->point == POINT_TO_HOST && host_enforced()) {
		reason = host_check(skb, 0, 0, 0);
		return reason ? drop(skb, reason) : TC_ACT_OK;
	}
	if (cfg_tunnel_ifindex && o->point == POINT_TO_OVERLAY) {
		reason = overlay_send(skb);
		if (reason == TC_ACT_REDIRECT)
			return reason;
		goto refuse;
	}
	if (o->masquerade)
		skb->mark |= MARK_MASQUERADE;
	return TC_ACT_OK;

refuse:
	if (!src) {
		__u32 ifindex = skb->ifindex;

		src = bpf_map_lookup_elem(&interfaces, &ifindex);
		if (src) {
			o->self_identity = src->identity;
			o->endpoint = src->id;
		}
	}
	dst = endpoint_find(&p->dst);
	if (dst)
		o->peer_identity = dst->identity;
	verdict = drop(skb, reason);
	return p->translated == TRANSLATED_REFUSED ? answer_unreachable(skb) : verdict;
}

// inbound delivers what comes from the uplink or from the node's own stack to a local endpoint.
static __always_inline int inbound(struct __sk_buff *skb, struct scratch *s, bool from_uplink)
{
	struct packet *p = &s->packet;
	struct ipcache_entry *range;
	struct endpoint *dst;
	int reason, verdict;

	if (skb->protocol != bpf_htons(ETH_P_IP) && skb->protocol != bpf_htons(ETH_P_IPV6))
		return TC_ACT_OK;
	reason = packet_l3(skb);
	if (!from_uplink && upstream_mark(skb->mark))
		return from_proxy(skb, s, reason);
	dst = endpoint_find(&p->dst);
	if (dst) {
		if (!reason)
			reason = p->fragment == FRAGMENT_LATER ? 0 : packet_l4(skb);
		if (!reason && p->fragment)
			reason = frags_resolve();
		if (!reason && !from_uplink) {
			reason = proxy_spoke(skb);
			if (reason)
				return drop(skb, reason);
		}
		// Of the node's processes, too: theirs is the connection of the pod, which the host's rules have
		// passed.
		if (!reason && proxy_answers(skb))
			return proxy_take(skb);
		if (!reason && !from_uplink && host_enforced() && host_owns(&p->src)) {
			reason = host_check(skb, 1, 0, 0);
			if (reason)
				return drop(skb, reason);
		}
		if (!reason)
			return deliver(skb, s, dst, from_uplink ? NULL : endpoint_find(&p->src),
				       from_uplink ? DELIVER_FROM_UPLINK : DELIVER_FROM_HOST);
		inbound_fault(s, dst);
		return drop(skb, reason);
	}
	if (from_uplink) {
		const volatile struct addr *node = p->v4 ? &cfg_node_v4 : &cfg_node_v6;
		bool own = p->dst.hi == node->hi && p->dst.lo == node->lo;

		if (!reason && p->fragment != FRAGMENT_LATER)
			reason = packet_l4(skb);
		if (!reason && p->fragment)
			reason = frags_resolve();
		if (!reason && own && inbound_claimed(skb, s, &verdict))
			return verdict;
		if (!reason && !host_exempt(p) && inbound_service(skb, s, &verdict))
			return verdict;
		if (own)
			return host_inbound(skb, reason);
	} else if (!p->v4 && (p->dst.lo || p->dst.hi) && (bpf_ntohl((__u32)p->dst.hi) >> 24) == 0xff) {
		metric_add(METRIC_MULTICAST_CONTROL, 1, p->bytes);
		return TC_ACT_SHOT;
	}
	range = ipcache_find(&p->dst);
	if (from_uplink && range && range->identity == IDENTITY_HOST)
		return host_inbound(skb, reason);
	if (range && (range->flags & IPCACHE_LOCAL_PODS)) {
		if (!reason && p->fragment != FRAGMENT_LATER)
			packet_l4(skb);
		inbound_fault(s, NULL);
		return drop(skb, DROP_UNROUTABLE);
	}
	return TC_ACT_OK;
}

// from_network: what comes from other machines, at the ingress of the uplink.
SEC("tc")
int from_network(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();

	if (!s)
		return TC_ACT_SHOT;
	return inbound(skb, s, true);
}

// outbound_proxied counts what the proxy answers in the name of a pod of this node, and gives it the address of the
// service that the client used: 0 or a drop reason. What comes from another interface is not the stack's own.
static __always_inline int outbound_proxied(struct __sk_buff *skb, struct scratch *s)
{
	int reason;

	__builtin_memset(&s->pass, 0, sizeof(s->pass));
	if (skb->ingress_ifindex || (skb->protocol != bpf_htons(ETH_P_IP) && skb->protocol != bpf_htons(ETH_P_IPV6)))
		return 0;
	reason = packet_l3(skb);
	if (reason || !endpoint_find(&s->packet.src))
		return 0;
	s->decision.slot = 0;
	reason = proxy_outbound(skb, s, reason);
	if (reason || !s->decision.slot || !lb_is_answer(s))
		return reason;
	reason = lb_answer(skb, &s->packet);
	return reason > 0 ? reason : 0;
}

// to_network: what leaves by the uplink. Packets of pods that leave the cluster, which from_pod has marked, get the
// node's address.
SEC("tc")
int to_network(struct __sk_buff *skb)
{
	struct scratch *s;
	struct endpoint *src;
	struct packet *p;
	struct pass *o;
	int reason;

	s = scratch_get();
	if (!s)
		return TC_ACT_SHOT;
	if (!cfg_masquerade || (skb->mark & MARK_MASK) != MARK_MASQUERADE) {
		int verdict;

		if (skb->mark & MARK_MASK)
			return TC_ACT_OK;
		verdict = host_outbound(skb, s);
		if (verdict != TC_ACT_OK)
			return verdict;
		reason = outbound_proxied(skb, s);
		if (!reason)
			reason = outbound_answer(skb, s);
		if (!reason)
			return TC_ACT_OK;
		if (!s->pass.endpoint)
			inbound_fault(s, NULL);
		return drop(skb, reason);
	}
	p = &s->packet;
	reason = packet_l3(skb);
	if (!reason && p->fragment != FRAGMENT_LATER)
		reason = packet_l4(skb);
	if (!reason && p->fragment)
		reason = frags_resolve();
	src = endpoint_find(&p->src);
	if (!src)
		return host_outbound(skb, s); // an ICMP error of the node's stack that inherited the mark
	if (!reason)
		reason = nat_out(skb);
	if (!reason)
		return TC_ACT_OK;
	o = &s->pass;
	__builtin_memset(o, 0, sizeof(*o));
	o->sent = 1;
	o->self_identity = src->identity;
	o->ifindex = skb->ifindex;
	o->endpoint = src->id;
	return drop(skb, reason);
}

// from_host: what the node's own stack sends to local pods, at the ingress of the receiving end of the node's veth
// pair.
SEC("tc")
int from_host(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();

	if (!s)
		return TC_ACT_SHOT;
	return inbound(skb, s, false);
}

// from_overlay: what other nodes send through the tunnel, at the ingress of its device.
SEC("tc")
int from_overlay(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();

	return s ? overlay_inbound(skb, s) : TC_ACT_SHOT;
}

// to_overlay: what pods and the node's own stack send through the tunnel, at the egress of its device.
SEC("tc")
int to_overlay(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();

	return s ? overlay_outbound(skb, s) : TC_ACT_SHOT;
}

// to_pod: what comes to a pod round the ingress hooks, at the egress of the host side of its veth pair.
// bpf_redirect_peer does not pass here, so that nothing should.
SEC("tc")
int to_pod(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();
	struct endpoint *dst;
	struct packet *p;

	if (!s)
		return TC_ACT_SHOT;
	p = &s->packet;
	if (skb->protocol == bpf_htons(ETH_P_ARP) || (skb->mark & MARK_MASK) == MARK_DELIVERED)
		return TC_ACT_OK;
	if (skb->protocol != bpf_htons(ETH_P_IP) && skb->protocol != bpf_htons(ETH_P_IPV6)) {
		metric_add(METRIC_BYPASSED, 1, skb->len);
		return TC_ACT_SHOT;
	}
	if (!packet_l3(skb) && p->fragment != FRAGMENT_LATER && !packet_l4(skb) && p->proto == IPPROTO_ICMPV6) {
		int verdict, reason;

		if (icmp6_control(p, &verdict, &reason))
			return verdict;
	}
	metric_add(METRIC_BYPASSED, 1, p->bytes);
	dst = endpoint_find(&p->dst);
	inbound_fault(s, dst);
	return drop(skb, DROP_UNROUTABLE);
}
