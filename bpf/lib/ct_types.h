/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Connection tracking: what an entry is. */
#ifndef WEIR_CT_TYPES_H
#define WEIR_CT_TYPES_H

#include "record.h"

enum ct_state {
	CT_NONE = 0,
	CT_SYN_SENT = 1,    /* half-open: only the originator spoke */
	CT_SYN_RECV = 2,    /* half-open: the responder answered */
	CT_ESTABLISHED = 3, /* also every protocol without a handshake */
	CT_FIN_WAIT = 4,    /* one side has closed */
	CT_CLOSED = 5,	    /* both sides closed and acknowledged, or reset */
	CT_DEAD = 6,	    /* its final record is written; the entry is deleted within the same program run */
};

enum ct_flags {
	CT_PICKED_UP = 1,  /* the start was not seen */
	CT_MASQUERADE = 2, /* leaves the node with the node's address */
	CT_RELATED = 4,	   /* an ICMP error about a tracked connection */
	CT_V4 = 8,
	CT_LO_IS_LOCAL = 16, /* the key's lo side is the endpoint */
	CT_ANSWERED = 32,    /* packets went both ways */
	CT_TRANSLATED = 64,  /* the responder has another address for the originator: answers are translated here */
	CT_UPSTREAM = 128,   /* the other end is an upstream socket of the proxy */
};

#define CT_AUDITED 0x80 /* in ct_conn.verdict */

/* ct_key: one entry per observation point (endpoint), whichever way a packet goes. The two ends are sorted: lo <= hi.
 */
struct ct_key {
	struct addr lo;
	struct addr hi;
	__be16 lo_port; /* ICMP echo: the asking side's port is the id, the other's 0; other ICMP: 0xffff and type << 8
			   | code of the receiver */
	__be16 hi_port;
	__u16 endpoint;
	__u8 proto;
	__u8 kind; /* enum kind */
};

/* ct_conn: [0] is originator to responder, [1] is back. Everything in it changes under the entry's lock, except
 * identities and what the local socket tells (single words, last writer wins). */
struct ct_conn {
	__u64 tail; /* the last 8 bytes of the key: tells an element that was freed and used again */
	__u64 connection;
	__u64 expires; /* CLOCK_MONOTONIC ns */
	struct traffic dir[2];
	__u64 reported[2]; /* when the last record of that direction was written */
	__u64 syn_time;
	__u32 fin_seq[2]; /* host order: what an ACK of the FIN acknowledges */
	__u32 self_identity;
	__u32 service;
	__u32 ifindex;
	__u32 handshake_us;
	__u32 srtt_us;
	__u32 retransmissions;
	__u8 tcp_flags[2];
	__u8 state;
	__u8 known;
	__u8 direction; /* enum direction */
	__u8 out_point; /* trace point of packets that the endpoint sends */
	__u8 flags;	/* enum ct_flags */
	__u8 fins;	/* bit d: FIN seen from direction d; bit d+2: acknowledged */
	__u8 icmp_type;
	__u8 icmp_code;
	__u8 policy_direction; /* enum direction: the packet that began it was sent or received, whatever its flags say;
				  unknown: policy is not asked, the proxy or a service's route has been */
	__u8 verdict;	       /* enum policy_verdict | CT_AUDITED */
	__u32 peer_identity;
	__u32 rule;	  /* slot << 20 | number of the rule that decided */
	__u32 generation; /* of policy when it was decided */
#ifdef WEIR_NEXT_LAYOUT	  /* only the tests' build that is one layout ahead: see datapath/layout_next.go */
	__u64 carried;	  /* packets that were counted in this layout */
#endif
};

struct ct_entry {
	struct bpf_spin_lock lock;
	__u32 pad;
	struct ct_conn conn;
};

/* ct_template is laid out like ct_entry, for memory in which the kernel allows no lock. */
struct ct_template {
	__u64 lock;
	struct ct_conn conn;
};

_Static_assert(sizeof(struct ct_template) == sizeof(struct ct_entry), "same layout");

_Static_assert(sizeof(struct ct_key) == 40, "no padding");

#endif
