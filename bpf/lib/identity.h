/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Whose address is it. */
#ifndef WEIR_IDENTITY_H
#define WEIR_IDENTITY_H

#include "ipcache.h"
#include "scratch.h"

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

/* peer_resolve finds who the other end is that is no local endpoint, and what policies know it by. kept is the identity
 * that a connection's other end had, or 0. */
static __always_inline void peer_resolve(struct pass *o, const struct packet *p, __u32 kept)
{
	const struct addr *a = o->sent ? &p->dst : &p->src;
	struct ipcache_entry *found = ipcache_find(a);
	__u32 tunnelled = o->sent ? 0 : p->tunnel_identity;

	o->peer_identity = found ? found->identity : 0;
	o->peer = found ? found->peer : 0;
	if (tunnelled == IDENTITY_REMOTE_NODE && o->peer_identity == IDENTITY_KUBE_APISERVER)
		tunnelled = 0; /* a node does not know what it is to others */
	if (identity_is_outside(tunnelled))
		tunnelled = 0; /* a node passes it on; who it is we know as well */
	if (tunnelled && tunnelled != o->peer_identity) {
		o->peer_identity = tunnelled;
		o->peer = 0;
	}
	/* In a tunnel identities come with the packets: ipcache may know less. */
	if (!o->peer_identity && !o->peer && cfg_tunnel_ifindex && identity_is_pod(kept))
		o->peer_identity = kept;
	if (!o->peer_identity)
		o->peer_identity = identity_world(a);
	if (!o->peer)
		o->peer = o->peer_identity;
}

static __always_inline __u32 endpoint_peer(const struct endpoint *ep)
{
	return ep->peer ? ep->peer : ep->identity;
}

#endif
