/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Policy of the node itself. Its processes are an endpoint, HOST_ENDPOINT, that is looked at only while a policy names
 * it: at the uplink, in the overlay, and between them and local pods. */
#ifndef WEIR_HOST_H
#define WEIR_HOST_H

#include "ct.h"
#include "drop.h"
#include "frags.h"
#include "proxy.h"

static __always_inline bool host_enforced(void)
{
	return policy_of(HOST_ENDPOINT) != 0;
}

/* host_owns says whether an address is the node's own. */
static __always_inline bool host_owns(const struct addr *a)
{
	const volatile struct addr *own = addr_is_v4(a) ? &cfg_node_v4 : &cfg_node_v6;
	struct ipcache_entry *found;

	if (a->hi == own->hi && a->lo == own->lo)
		return true;
	found = ipcache_find(a);
	return found && found->identity == IDENTITY_HOST;
}

/* host_exempt: what keeps a link going, and the tunnel's own packets: whose pods they are of is decided inside. */
static __always_inline bool host_exempt(const struct packet *p)
{
	if (p->proto == IPPROTO_ICMPV6)
		return (p->icmp_type >= 130 && p->icmp_type <= 137) || p->icmp_type == 143;
	return p->proto == IPPROTO_UDP && cfg_tunnel_port && p->dport == bpf_htons(cfg_tunnel_port);
}

/* host_check decides a packet that the node's processes send or get, which is in scratch with its L3 header read; fault
 * is what that gave. It returns 0 or a drop reason. */
__noinline int host_check(struct __sk_buff *skb, __u32 sent, __u32 from_uplink, int fault)
{
	struct scratch *s = scratch_get();
	struct endpoint *peer;
	struct packet *p;
	struct pass *o;
	__u32 policy;

	if (!s)
		return DROP_INVALID_PACKET;
	p = &s->packet;
	o = &s->pass;
	__builtin_memset(o, 0, sizeof(*o));
	o->sent = sent;
	o->from_uplink = from_uplink;
	o->self_identity = IDENTITY_HOST;
	o->ifindex = skb->ifindex;
	o->endpoint = HOST_ENDPOINT;
	if (!fault && p->fragment != FRAGMENT_LATER)
		fault = packet_l4(skb);
	if (!fault && p->fragment)
		fault = frags_resolve();
	if (fault) {
		/* What cannot be read no rule can allow. */
		policy = policy_enforced(o, sent ? DIRECTION_EGRESS : DIRECTION_INGRESS);
		return policy && !(policy & POLICY_AUDIT) ? fault : 0;
	}
	if (host_exempt(p))
		return 0;
	peer = from_uplink ? NULL : endpoint_find(sent ? &p->dst : &p->src);
	if (peer) {
		o->local_peer = 1;
		o->peer_identity = peer->identity;
		o->peer = endpoint_peer(peer);
	}
	return ct_update(skb);
}

/* host_redirect asks the node's own ingress rules for a pod's packet to the node that goes to the proxy: what the proxy
 * sends on does not pass here again, since the kernel knows its own addresses first. A verdict. */
__noinline int host_redirect(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();
	struct decision kept;
	int reason;

	if (!s)
		return TC_ACT_SHOT;
	__builtin_memcpy(&kept, &s->decision, sizeof(kept));
	reason = host_check(skb, 0, 0, 0);
	if (reason)
		return drop(skb, reason);
	__builtin_memcpy(&s->decision, &kept, sizeof(kept));
	return proxy_redirect(skb);
}

/* host_inbound ends the way of a packet to the node's own address. */
static __always_inline int host_inbound(struct __sk_buff *skb, int fault)
{
	int reason = host_enforced() ? host_check(skb, 0, 1, fault) : 0;

	return reason ? drop(skb, reason) : TC_ACT_OK;
}

/* host_outbound looks at a packet that leaves the node: one of its processes' own is decided. Marked packets are not.
 */
static __always_inline int host_outbound(struct __sk_buff *skb, struct scratch *s)
{
	int fault, reason;

	if (!host_enforced())
		return TC_ACT_OK;
	if (skb->protocol != bpf_htons(ETH_P_IP) && skb->protocol != bpf_htons(ETH_P_IPV6))
		return TC_ACT_OK;
	fault = packet_l3(skb);
	if (!host_owns(&s->packet.src))
		return TC_ACT_OK;
	reason = host_check(skb, 1, 0, fault);
	return reason ? drop(skb, reason) : TC_ACT_OK;
}

#endif
