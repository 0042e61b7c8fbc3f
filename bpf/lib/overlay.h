/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* VXLAN between nodes. The VNI is the sender's identity, so that the receiver's policy needs no row of the sender's
 * address. */
#ifndef WEIR_OVERLAY_H
#define WEIR_OVERLAY_H

#include "claimed.h"
#include "host.h"
#include "tunnel.h"

/* overlay_send brings the packet in scratch, which a pod sends, to the node of its destination: TC_ACT_REDIRECT, or a
 * drop reason. */
__noinline int overlay_send(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();
	struct ipcache_entry *found;
	struct addr node;
	int reason;

	if (!s)
		return DROP_INVALID_PACKET;
	found = ipcache_find(&s->packet.dst);
	if (!found || addr_is_zero(&found->node))
		return DROP_NO_TUNNEL_ENDPOINT; /* it had one when the connection began */
	node = found->node;
	reason = overlay_key(skb, &node, s->pass.self_identity);
	if (reason)
		return reason;
	skb->mark = (skb->mark & ~MARK_MASK) | MARK_DELIVERED;
	skb->cb[0] = cfg_tunnel_ifindex;
	return bpf_redirect(cfg_tunnel_ifindex, 0);
}

/* overlay_sender reads who sent the packet in scratch, which came by the tunnel: 0 or a drop reason. */
static __always_inline int overlay_sender(struct __sk_buff *skb, struct packet *p)
{
	struct bpf_tunnel_key key = {};
	struct ipcache_entry *found;
	struct addr node;

	if (!bpf_skb_get_tunnel_key(skb, &key, sizeof(key), 0))
		addr_from_v4(&node, bpf_htonl(key.remote_ipv4));
	else if (!bpf_skb_get_tunnel_key(skb, &key, sizeof(key), BPF_F_TUNINFO_IPV6))
		__builtin_memcpy(&node, key.remote_ipv6, sizeof(node));
	else
		return DROP_INVALID_PACKET;
	/* Only nodes are believed. */
	found = ipcache_find(&node);
	if (!found || (found->identity != IDENTITY_REMOTE_NODE && found->identity != IDENTITY_KUBE_APISERVER))
		return DROP_INVALID_SOURCE_IP;
	if (key.tunnel_id == IDENTITY_UNKNOWN || key.tunnel_id == IDENTITY_HOST)
		return DROP_INVALID_SOURCE_IP;
	p->tunnel_identity = key.tunnel_id;
	p->tunnel_node = node;
	return 0;
}

/* overlay_inbound: a packet from another node's pod or processes. */
static __always_inline int overlay_inbound(struct __sk_buff *skb, struct scratch *s)
{
	struct packet *p = &s->packet;
	struct ipcache_entry *found;
	struct endpoint *dst;
	int fault, reason;

	if (skb->protocol != bpf_htons(ETH_P_IP) && skb->protocol != bpf_htons(ETH_P_IPV6))
		return TC_ACT_SHOT; /* the device has no neighbours */
	fault = packet_l3(skb);
	reason = overlay_sender(skb, p);
	dst = endpoint_find(&p->dst);
	if (reason) {
		if (!fault && p->fragment != FRAGMENT_LATER)
			packet_l4(skb); /* for the record */
		inbound_fault(s, dst);
		return drop(skb, reason);
	}
	if (dst) {
		if (!fault && p->fragment != FRAGMENT_LATER)
			fault = packet_l4(skb);
		if (!fault && p->fragment)
			fault = frags_resolve();
		if (!fault && proxy_answers(skb))
			return proxy_take(skb);
		if (!fault)
			return deliver(skb, s, dst, NULL, DELIVER_FROM_UPLINK);
		inbound_fault(s, dst);
		return drop(skb, fault);
	}
	if (host_owns(&p->dst)) {
		if (!fault && p->fragment != FRAGMENT_LATER)
			fault = packet_l4(skb);
		if (!fault && p->fragment)
			fault = frags_resolve();
		if (!fault && inbound_claimed(skb, s, &reason))
			return reason;
		/* The stack takes no packet that was for another MAC. */
		bpf_skb_change_type(skb, PACKET_HOST);
		return host_inbound(skb, fault);
	}
	found = ipcache_find(&p->dst);
	if (found && found->identity == IDENTITY_UNMANAGED && addr_is_zero(&found->node) &&
	    !(found->flags & IPCACHE_LOCAL_PODS)) {
		bpf_skb_change_type(skb, PACKET_HOST); /* a pod that the mesh leaves alone: the stack has its route */
		return TC_ACT_OK;
	}
	inbound_fault(s, NULL);
	return drop(skb, DROP_UNROUTABLE);
}

/* overlay_outbound: a packet of the node's stack that is routed to the tunnel device. */
static __always_inline int overlay_outbound(struct __sk_buff *skb, struct scratch *s)
{
	struct packet *p = &s->packet;
	struct ipcache_entry *found;
	struct endpoint *src;
	struct addr node;
	__u32 identity;
	int fault, reason = 0;

	if ((skb->mark & MARK_MASK) == MARK_DELIVERED)
		return TC_ACT_OK; /* from_pod has done all that */
	if (skb->protocol != bpf_htons(ETH_P_IP) && skb->protocol != bpf_htons(ETH_P_IPV6))
		return TC_ACT_SHOT;
	fault = packet_l3(skb);
	if (!p->v4 && (bpf_ntohl((__u32)p->dst.hi) >> 24) == 0xff) {
		metric_add(METRIC_MULTICAST_CONTROL, 1, p->bytes); /* the device's own neighbour discovery */
		return TC_ACT_SHOT;
	}
	src = endpoint_find(&p->src);
	if (src) {
		identity = src->identity;
		if (!skb->ingress_ifindex)
			reason = proxy_outbound(skb, s, fault);
		if (reason)
			return drop(skb, reason);
	} else if (host_owns(&p->src)) {
		identity = IDENTITY_REMOTE_NODE; /* what this node is to others */
		if (host_enforced())
			reason = host_check(skb, 1, 0, fault);
		if (reason)
			return drop(skb, reason);
	} else {
		identity = identity_world(&p->src);
	}
	found = ipcache_find(&p->dst);
	if (!found || addr_is_zero(&found->node)) {
		reason = DROP_NO_TUNNEL_ENDPOINT;
	} else {
		node = found->node;
		reason = overlay_key(skb, &node, identity) ?: overlay_mac(skb);
	}
	if (reason) {
		__builtin_memset(&s->pass, 0, sizeof(s->pass));
		s->pass.sent = 1;
		s->pass.self_identity = src ? identity : IDENTITY_HOST;
		s->pass.endpoint = src ? src->id : 0;
		s->pass.ifindex = skb->ifindex;
		return drop(skb, reason);
	}
	skb->mark = (skb->mark & ~MARK_MASK) | MARK_DELIVERED;
	return TC_ACT_OK;
}

#endif
