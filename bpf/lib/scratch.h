/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Room for one packet's way through a tc program. Bottom halves are off there, so that nothing else on this CPU uses it meanwhile. It is
 * a map value, not stack, so that the steps can be global functions, each verified once. */
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
	__u8 sent;           /* the endpoint sends it; else it is delivered to it */
	__u8 local_peer;     /* the other end is an endpoint of this node */
	__u8 from_uplink;
	__u8 point;          /* where a sent packet goes; set by ct_classify */
	__u8 classified;
	__u8 masquerade;     /* out: the packet is to get the node's address */
};

struct scratch {
	struct packet packet;
	struct pass pass;
	struct ct_key key;
	struct ct_template entry;
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

#endif
