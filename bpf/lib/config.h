/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Load-time constants: set by the loader before the programs are verified, so that unused branches cost nothing. */
#ifndef WEIR_CONFIG_H
#define WEIR_CONFIG_H

#include "addr.h"

/* Bits of skb->mark that Weir uses: 0x0f00. The rest belongs to others. */
#define MARK_MASK  0x0f00
#define MARK_PROXY 0x0200 /* to a socket of the proxy: the value that its routing rule matches */
/* Packets of the proxy's upstream sockets carry the stage that they have passed. These are values of the whole mask. */
#define MARK_ROUTE_PASSED   0x0100 /* a service's route */
#define MARK_EGRESS_PASSED  0x0300 /* the client's egress rules */
#define MARK_INGRESS_PASSED 0x0500 /* the server's ingress rules */
#define MARK_MASQUERADE	    0x0400 /* from_pod -> to_network: give this packet the node's address */
#define MARK_DELIVERED	    0x0800 /* to_pod lets it through: an ingress hook has seen it */

/* Nanoseconds. */
volatile const __u64 cfg_report_interval = 5000000000ULL;
volatile const __u64 cfg_tcp_handshake = 60000000000ULL;
volatile const __u64 cfg_tcp_established = 21600000000000ULL;
volatile const __u64 cfg_tcp_closing = 120000000000ULL;
volatile const __u64 cfg_tcp_closed = 10000000000ULL;
volatile const __u64 cfg_udp = 60000000000ULL;
volatile const __u64 cfg_udp_answered = 180000000000ULL;
volatile const __u64 cfg_icmp = 60000000000ULL;

/* 1: a record for every packet. 0: new connections, new TCP flags, SYN, FIN, RST, and one a report interval and
 * direction. */
volatile const __u32 cfg_every_packet = 0;
volatile const __u32 cfg_masquerade = 0;
/* Wake the reader when a ring's fill crosses this many bytes. */
volatile const __u32 cfg_wakeup_bytes = 65536;
volatile const __u32 cfg_world_v4 = 9;
volatile const __u32 cfg_world_v6 = 10;
/* Addresses that masqueraded packets get; zero = none of that family. */
volatile const struct addr cfg_node_v4 = {};
volatile const struct addr cfg_node_v6 = {};
/* The VXLAN device and its port (host order); 0 = native routing. */
volatile const __u32 cfg_tunnel_ifindex = 0;
volatile const __u32 cfg_tunnel_port = 0;
volatile const __u32 cfg_ct_earlier = 0; /* layout of ct_earlier; 0 = it is empty */
/* Ports (host order) that masquerading claims; keep clear of ip_local_port_range. */
volatile const __u32 cfg_nat_port_min = 61000;
volatile const __u32 cfg_nat_port_max = 65535;

/* Slots of a Maglev table: a prime, MAGLEV_SLOTS at most. */
volatile const __u32 cfg_maglev_size = 1021;
/* The kernel lets a socket hook choose the error of the call that it refuses. */
volatile const __u32 cfg_set_retval = 0;

#endif
