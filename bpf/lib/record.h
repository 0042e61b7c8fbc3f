/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What the programs tell the agent, one fixed-size struct for all. */
#ifndef WEIR_RECORD_H
#define WEIR_RECORD_H

#include "addr.h"

enum record_type {
	RECORD_NONE = 0,
	RECORD_TRACE = 1,	/* a packet passed an observation point */
	RECORD_DROP = 2,	/* a packet was dropped; see reason */
	RECORD_TRANSLATION = 3, /* a socket's destination was translated from a service address to a backend */
	RECORD_FINAL = 4,	/* a connection's last totals; its entry is gone or was taken over */
	RECORD_VERDICT = 5,	/* what policy decided for a new connection, or for a live one at a change */
	RECORD_TYPES = 6,
};

/* Hubble's numbers. */
enum trace_point {
	POINT_TO_ENDPOINT = 0,
	POINT_TO_HOST = 2,
	POINT_TO_OVERLAY = 4,
	POINT_FROM_ENDPOINT = 5,
	POINT_TO_NETWORK = 11,
};

/* Hubble's numbers, as the datapath has them. */
enum trace_reason {
	TRACE_NEW = 0,
	TRACE_ESTABLISHED = 1,
	TRACE_REPLY = 2,
	TRACE_RELATED = 3,
	TRACE_UNKNOWN = 5,
};

/* Direction of the connection, seen from the endpoint; Hubble's numbers. */
enum direction {
	DIRECTION_UNKNOWN = 0,
	DIRECTION_INGRESS = 1,
	DIRECTION_EGRESS = 2,
};

/* Which of the optional values of a connection are known. */
enum known_bits {
	KNOWN_HANDSHAKE = 1,
	KNOWN_SRTT = 2,
	KNOWN_RETRANSMISSIONS = 4,
};

enum record_flags {
	RECORD_IS_REPLY = 1,	 /* the packet goes from responder to originator */
	RECORD_FRAGMENT = 2,	 /* the packet is a fragment */
	RECORD_PICKED_UP = 4,	 /* the connection's start was not seen: originator and responder are a guess */
	RECORD_SOCK_REVERSE = 8, /* a translation of an answer (service address shown to the socket) */
	RECORD_AUDITED = 32,	 /* policy would have dropped it, and audit let it pass */
	RECORD_MASQUERADED = 16, /* this connection's packets leave the node with the node's address */
};

/* Hubble's numbers. */
enum drop_reason {
	DROP_INVALID_SOURCE_IP = 132,
	DROP_POLICY = 133, /* no rule allows it */
	DROP_INVALID_PACKET = 134,
	DROP_TRUNCATED = 135,
	DROP_UNKNOWN_L4 = 137,
	DROP_UNSUPPORTED_L3 = 139,
	DROP_WRITE_ERROR = 141,
	DROP_UNKNOWN_TARGET = 150,
	DROP_UNROUTABLE = 151,
	DROP_CT_FULL = 155,
	DROP_INVALID_EXTENSION = 156,
	DROP_PROXY_FRAGMENT = 157, /* of a flow that goes through the proxy */
	DROP_NO_BACKEND = 158,
	DROP_NO_TUNNEL_ENDPOINT = 160,
	DROP_NO_NAT_PORT = 167,
	DROP_NAT_PROTOCOL = 168,
	DROP_NO_ROUTE = 169,
	DROP_IS_CLUSTER_IP = 174,
	DROP_UNKNOWN_FRAGMENT = 175,
	DROP_FORBIDDEN_ICMP6 = 176,
	DROP_SOURCE_RANGE = 177,   /* the service is not for this client */
	DROP_NO_LISTENER = 178,	   /* the proxy has none for the slot, or has lost the connection */
	DROP_PROXY_ASSIGN = 179,   /* the kernel would not give the packet to the proxy's socket */
	DROP_PROXY_PROTOCOL = 180, /* a protocol that no proxy takes */
	DROP_POLICY_DENY = 181,	   /* a rule denies it */
	DROP_TTL_EXCEEDED = 196,
	DROP_SLOT_CHANGED = 205, /* policy has moved the connection to another slot: it is reset */
};

/* traffic is what went in one direction of a connection. Times are CLOCK_MONOTONIC nanoseconds; 0 = nothing went. */
struct traffic {
	__u64 packets; /* segments as on the wire */
	__u64 bytes;   /* their IP length, headers of IP included */
	__u64 first;
	__u64 last;
};

/* record: source and destination are those of this packet, except that a RECORD_FINAL names originator and responder,
 * and a RECORD_TRANSLATION the socket and the service address. All counters are totals of the connection up to and with
 * this packet. */
struct record {
	__u64 time;		/* CLOCK_MONOTONIC, ns */
	__u64 connection;	/* the same in all records of one connection at one observation point; 0 = none */
	struct traffic forward; /* originator to responder */
	struct traffic reverse;
	struct addr src;
	struct addr dst;
	struct addr xlated;  /* translation: the backend */
	__u64 socket_cookie; /* translation only */
	__u64 cgroup_id;     /* translation only */
	__u16 sport;	     /* host order, as the other ports here; 0 where the protocol has none */
	__u16 dport;
	union {
		__u16 xlated_port; /* translation: the backend's */
		__u16 slot;	   /* else: of the proxy, that the connection goes through; 0 = none */
	};
	__u16 endpoint; /* whose observation point this is; 0 = not known */
	__u32 src_identity;
	__u32 dst_identity;
	__u32 service; /* service of the connection; 0 = none or not known */
	__u32 rule;    /* number of the deciding policy rule; 0 = none */
	__u32 ifindex;
	__u32 length;	       /* IP length of this packet as it passed, unsegmented */
	__u32 handshake_us;    /* SYN to the ACK that ends the handshake */
	__u32 srtt_us;	       /* of the local socket */
	__u32 retransmissions; /* segments that the local socket sent again */
	__u8 type;	       /* enum record_type */
	__u8 reason;	       /* drop: enum drop_reason; trace: enum trace_reason */
	__u8 point;	       /* enum trace_point */
	__u8 direction;	       /* enum direction */
	__u8 proto;	       /* IP protocol number */
	__u8 tcp_flags;	       /* of this packet, as in the header */
	__u8 icmp_type;
	__u8 icmp_code;
	__u8 flags;	    /* enum record_flags */
	__u8 known;	    /* enum known_bits */
	__u8 state;	    /* enum ct_state */
	__u8 forward_flags; /* TCP flags seen so far */
	__u8 reverse_flags;
	__u8 src_mac[6];
	__u8 dst_mac[6];
	__u8 ip_version; /* 4 or 6 */
	__u8 verdict;	 /* verdict: enum policy_verdict */
	__u8 pad[1];
};

_Static_assert(sizeof(struct record) == 216, "a record is 216 bytes");

#endif
