/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Naming a tunnel's other end. */
#ifndef WEIR_TUNNEL_H
#define WEIR_TUNNEL_H

#include "record.h"

/* overlay_key names the other node and who sends: 0 or a drop reason. */
static __always_inline int overlay_key(struct __sk_buff *skb, const struct addr *node, __u32 identity)
{
	struct bpf_tunnel_key key = {.tunnel_id = identity, .tunnel_ttl = 64};
	__u64 flags = BPF_F_ZERO_CSUM_TX;

	if (addr_is_v4(node)) {
		key.remote_ipv4 = bpf_ntohl(addr_v4(node)); /* host order, unlike IPv6 */
	} else {
		__builtin_memcpy(key.remote_ipv6, node, sizeof(*node));
		flags = BPF_F_TUNINFO_IPV6;
	}
	return bpf_skb_set_tunnel_key(skb, &key, sizeof(key), flags) ? DROP_WRITE_ERROR : 0;
}

/* overlay_mac makes a frame's source MAC another one than the device's: all nodes' devices have one MAC, so that stacks
 * take what comes, and a device ignores what seems to come from itself. */
static __always_inline int overlay_mac(struct __sk_buff *skb)
{
	__u8 last;

	if (bpf_skb_load_bytes(skb, 11, &last, 1))
		return DROP_WRITE_ERROR;
	last ^= 1;
	return bpf_skb_store_bytes(skb, 11, &last, 1, 0) ? DROP_WRITE_ERROR : 0;
}

#endif
