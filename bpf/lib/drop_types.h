/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
#ifndef WEIR_DROP_TYPES_H
#define WEIR_DROP_TYPES_H

#include "addr.h"

struct drop_key {
	__u32 peer_identity;
	__u32 rule;
	__u16 endpoint;
	__be16 port; /* destination port of the packet */
	__u8 direction;
	__u8 proto;
	__u8 reason;
	__u8 pad;
};

struct drop_value {
	__u64 records; /* drops, each with a record written or lost */
	__u64 packets; /* segments as on the wire */
	__u64 bytes;
};

#endif
