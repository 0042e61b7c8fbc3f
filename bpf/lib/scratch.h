/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Room for one packet's way through a tc program. Bottom halves are off there, so that nothing else on this CPU uses it
 * meanwhile. It is a map value, not stack, so that the steps can be global functions, each verified once. */
#ifndef WEIR_SCRATCH_H
#define WEIR_SCRATCH_H

#include "ct_types.h"
#include "packet.h"

/* pass: the observation point at which the packet is looked at. */
struct pass {
	__u32 self_identity;
	__u32 peer_identity; /* 0 = to be looked up */
	__u32 ifindex;
	__u16 endpoint;
	__u8 sent;	 /* the endpoint sends it; else it is delivered to it */
	__u8 local_peer; /* the other end is an endpoint of this node */
	__u8 from_uplink;
	__u8 point; /* where a sent packet goes; set by ct_classify */
	__u8 classified;
	__u8 masquerade; /* out: the packet is to get the node's address */
	__u8 related;	 /* an ICMP error about a connection of the endpoint */
	__u32 service;	 /* that a new connection of the endpoint began on */

	__u32 peer;	  /* the other end as policies know it; set with peer_identity */
	__u32 generation; /* of policy, read before anything is decided */
	__u32 rule;	  /* of the decision, with its slot */
	__u8 verdict;	  /* enum policy_verdict */
	__u8 audited;
	__u8 policy_direction; /* enum direction: which policy decided */
	__u8 decided;	       /* enum decided */
	__u8 hairpin;	       /* a pod talks to itself by a service: no policy */
	__u8 translated;       /* the packet was translated at this observation point */
	__u8 from_host;	       /* the node's own stack sends it */
	__u8 upstream;	       /* the packet is of an upstream socket of the proxy */
	__u8 unasked;	       /* policy is not asked: the proxy has, or a service's route comes first */
};

enum decided {
	DECIDED_NOTHING = 0,
	DECIDED_LIVE = 1, /* for the connection that the entry holds */
	DECIDED_NEW = 2,  /* for a connection that the packet begins */
};

/* decision is what ct_hit decided under the entry's lock. */
struct decision {
	__u64 reported; /* when the last record of this direction was written */
	__u32 d;	/* index of the direction */
	__u32 emit;	/* write a record */
	__u32 began;	/* a connection begins in the entry */
	__u32 taken;	/* where another one was */
	__u32 changed;	/* policy decided otherwise than before */
	__u32 flags;	/* enum ct_flags */
	__u64 connection;
	__u32 policy_direction; /* of the entry, for its next decision */
	__u32 icmp_type;
	__u32 peer_identity;
	__u32 slot; /* of the connection */
	__u32 rule; /* with the slot */
	__u32 verdict;
	__u32 closed; /* the connection had ended */
};

struct scratch {
	struct packet packet;
	struct pass pass;
	struct decision decision;
	struct ct_key key;
	struct ct_template blank; /* all zero but the tail */
	struct record record;
	struct record final;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct scratch);
} scratch SEC(".maps"); /* tc programs only; not pinned */

static __always_inline struct scratch *scratch_get(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&scratch, &zero);
}

/* packet_l3 and packet_l4 read the packet into scratch: 0 or a drop reason. */
__noinline int packet_l3(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();

	return s ? packet_parse_l3(skb, &s->packet) : DROP_INVALID_PACKET;
}

__noinline int packet_l4(struct __sk_buff *skb)
{
	struct scratch *s = scratch_get();

	return s ? packet_parse_l4(skb, &s->packet) : DROP_INVALID_PACKET;
}

#endif
