/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Services and what sockets remember of them. */
#ifndef WEIR_SERVICE_TYPES_H
#define WEIR_SERVICE_TYPES_H

#include "addr.h"

struct service_key {
	struct addr addr;
	__be16 port;
	__u8 proto;
	__u8 pad[5];
};

enum service_flags {
	SERVICE_LOCAL = 1,	   /* backends of this node only */
	SERVICE_LOCAL_OUTSIDE = 2, /* the same, for clients outside of the cluster */
	SERVICE_RANGES = 4,	   /* clients must be in source_ranges */
	SERVICE_MAGLEV = 8,	   /* packets choose by table */
	SERVICE_MAGLEV_LOCAL = 16, /* there is a table of the local backends too */
	/* What datapath.Services was given, for the next process. */
	SERVICE_GIVEN_MAGLEV = 256,
	SERVICE_GIVEN_INTERNAL = 512,
	SERVICE_GIVEN_EXTERNAL = 1024,
};

/* service: a frontend, and how its set of backends lies: the ready ones first, then those that are terminating; in each
 * part those of this node first. */
struct service {
	__u32 id;  /* the agent's number of the frontend */
	__u32 set; /* backend set: another one after every change of the backends */
	__u32 ready;
	__u32 ready_local;
	__u32 terminating_local;
	__u32 total;
	__u32 group;	/* of affinity */
	__u32 affinity; /* seconds; 0 = none */
	__u32 flags;	/* enum service_flags */
	__u32 kind;	/* datapath.FrontendKind | slot of its route << 16 */
	__u64 check;	/* service_check of the key: an element that was freed and used again shows in it */
};

static __always_inline __u64 service_check(const struct service_key *k)
{
	return k->addr.hi * 31 ^ k->addr.lo ^ ((__u64)k->port << 16 | k->proto);
}

struct backend_key {
	__u32 set;
	__u32 slot; /* 0 .. total-1 */
};

struct backend {
	struct addr addr;
	__be16 port;
	__u8 pad[2];
	__u32 set; /* of the key, for the same reason as service.check */
};

/* member_key: is an address in a set, and at which slot. */
struct member_key {
	struct addr addr;
	__u32 set;
	__be16 port;
	__u8 pad[2];
};

struct range_key {
	__u32 prefixlen; /* 32 + that of the mapped address */
	__be32 service;
	__u8 addr[16];
};

struct maglev_key {
	__u32 set;
	__u32 local;
};

struct affinity_key {
	struct addr client; /* a pod's address; of a socket of the node: cookie of its network namespace and 0 */
	__u32 group;
	__u32 pad;
};

struct affinity_entry {
	struct addr backend;
	__u64 time; /* CLOCK_MONOTONIC ns, of the last connection */
	__be16 port;
	__u8 pad[6];
};

/* sock_choice: what a socket's last translation was; lives and dies with the socket. */
struct sock_choice {
	struct addr vip;
	struct addr backend;
	__be16 vip_port;
	__be16 backend_port;
	__u32 service;
	__u32 set;
	__u32 connected; /* UDP: no hook sees what it sends */
};

/* sockrev_key: which service address an unconnected UDP socket used when it got to this backend. */
struct sockrev_key {
	__u64 cookie;
	struct addr backend;
	__be16 port;
	__u8 pad[6];
};

struct sockrev_value {
	struct addr vip;
	__be16 port;
	__u8 pad[2];
	__u32 service;
};

/* svcconn_key: which service a connection belongs to; read once, when its ct entry is made. local_port is 0 for a
 * connected UDP socket, whose port is not yet chosen when it is translated; local is zero too when the socket's pod is
 * not known. */
struct svcconn_key {
	struct addr local;
	struct addr remote;
	__be16 local_port;
	__be16 remote_port;
	__u8 proto;
	__u8 pad[3];
};

struct svcconn_note {
	__u64 time; /* CLOCK_MONOTONIC ns */
	__u32 service;
	__u32 pad;
};

/* netns_endpoint: which endpoint a socket belongs to, by the cookie of its network namespace. */
struct netns_endpoint {
	struct addr v4; /* zero = none */
	struct addr v6;
	__u32 identity;
	__u32 ifindex;
	__u16 id;
	__u8 pad[6];
};

#endif
