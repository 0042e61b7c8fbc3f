/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Looking up addresses, for packets and sockets. */
#ifndef WEIR_IPCACHE_H
#define WEIR_IPCACHE_H

#include "config.h"
#include "maps.h"

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

#endif
