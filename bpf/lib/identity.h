/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Whose address is it. */
#ifndef WEIR_IDENTITY_H
#define WEIR_IDENTITY_H

#include "config.h"
#include "maps.h"
#include "scratch.h"

static __always_inline struct endpoint *endpoint_find(const struct addr *a)
{
	return bpf_map_lookup_elem(&endpoints, a);
}

static __always_inline struct ipcache_entry *ipcache_find(const struct addr *a)
{
	struct ipcache_key key = {.prefixlen = 128};

	__builtin_memcpy(key.addr, a, sizeof(key.addr));
	return bpf_map_lookup_elem(&ipcache, &key);
}

static __always_inline __u32 identity_world(const struct addr *a)
{
	return addr_is_v4(a) ? cfg_world_v4 : cfg_world_v6;
}

static __always_inline __u32 identity_find(const struct addr *a)
{
	struct ipcache_entry *entry = ipcache_find(a);

	if (entry && entry->identity)
		return entry->identity;
	return identity_world(a);
}

/* identity_is_outside: world, or a CIDR identity. */
static __always_inline bool identity_is_outside(__u32 identity)
{
	return identity == IDENTITY_WORLD || identity == IDENTITY_WORLD_V4 || identity == IDENTITY_WORLD_V6 ||
	       identity >= IDENTITY_LOCAL_MIN;
}

/* identity_is_pod: numbers of label sets. */
static __always_inline bool identity_is_pod(__u32 identity)
{
	return identity >= IDENTITY_POD_MIN && identity < IDENTITY_LOCAL_MIN;
}

/* peer_resolve finds the other end's identity and what policies know it by. kept is the identity that it had, or 0: in
 * a tunnel it came with the packets, and holds where ipcache knows nothing. */
static __always_inline void peer_resolve(struct pass *o, const struct addr *a, __u32 kept)
{
	struct ipcache_entry *found = ipcache_find(a);

	o->peer = 0;
	o->peer_identity = 0;
	if (found) {
		o->peer_identity = found->identity;
		o->peer = found->peer;
	}
	if (!o->peer_identity)
		o->peer_identity = !o->peer && cfg_tunnel_ifindex && identity_is_pod(kept) ? kept : identity_world(a);
	if (!o->peer)
		o->peer = o->peer_identity;
}

static __always_inline __u32 endpoint_peer(const struct endpoint *ep)
{
	return ep->peer ? ep->peer : ep->identity;
}

#endif
