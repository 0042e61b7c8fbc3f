/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Who is where: local endpoints, and the identity of every address. */
#ifndef WEIR_ENDPOINT_TYPES_H
#define WEIR_ENDPOINT_TYPES_H

#include "addr.h"

struct endpoint {
	__u32 ifindex; /* host-side interface */
	__u32 identity;
	__u16 id;
	__u8 mac[6]; /* of the pod */
	__u32 peer;  /* who it is to policies; 0 = its identity */
};

enum ipcache_flags {
	IPCACHE_LOCAL_PODS = 1,	   /* a range of local pod addresses: no endpoint there means that nobody is */
	IPCACHE_SERVICES = 2,	   /* a range of service addresses */
	IPCACHE_NO_MASQUERADE = 4, /* reached with the pod's own address */
	IPCACHE_NODE = 8,	   /* an address of a node, whatever its identity: node ports are served there */
};

struct ipcache_key {
	__u32 prefixlen; /* of the mapped address: IPv4 + 96 */
	__u8 addr[16];
};

struct ipcache_entry {
	__u32 identity;
	__u32 flags;	  /* enum ipcache_flags */
	struct addr node; /* node that has the address; zero = this one or none */
	__u32 peer;	  /* who it is to policies; 0 = its identity */
	__u32 pad;
};

enum identity {
	IDENTITY_UNKNOWN = 0,
	IDENTITY_HOST = 1,
	IDENTITY_WORLD = 2,
	IDENTITY_UNMANAGED = 3,
	IDENTITY_REMOTE_NODE = 6,
	IDENTITY_KUBE_APISERVER = 7,
	IDENTITY_WORLD_V4 = 9,
	IDENTITY_WORLD_V6 = 10,
	IDENTITY_POD_MIN = 100,
	IDENTITY_LOCAL_MIN = 1 << 24, /* CIDR identities from here */
};

#endif
