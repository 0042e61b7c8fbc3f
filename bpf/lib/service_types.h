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

struct service {
	__u32 id;    /* the agent's number of the service */
	__u32 set;   /* backend set: changes with every change of the backends */
	__u32 count; /* backends in the set */
	__u32 flags;
};

struct backend_key {
	__u32 set;
	__u32 slot; /* 0 .. count-1 */
};

struct backend {
	struct addr addr;
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
	__u32 pad;
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
