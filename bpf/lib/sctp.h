/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* SCTP's checksum, CRC32c over the whole packet, when only the ports change. A CRC is linear: the change of the
 * checksum is the CRC of the change, which is that of the ports and then nothing but zeros. */
#ifndef WEIR_SCTP_H
#define WEIR_SCTP_H

#include "vmlinux.h"
#include <bpf/bpf_helpers.h>

#define CRC32C_POLYNOMIAL 0x82f63b78
#define CRC32C_POWERS	  16

/* x^(8 * 2^k), bits reflected. */
static const __u32 crc32c_powers[CRC32C_POWERS] = {
    0x00800000, 0x00008000, 0x82f63b78, 0x6ea2d55c, 0x18b8ea18, 0x510ac59a, 0xb82be955, 0xb8fdb1e7,
    0x88e56f72, 0x74c360a4, 0xe4172b16, 0x0d65762a, 0x35d73a62, 0x28461564, 0xbf455269, 0xe2ea32dc,
};

/* sctp_checksum_change: change is the old ports xor the new ones, as the four bytes lie in the packet; length is the
 * packet's, from the ports on. What it returns is to be xored into the checksum. */
__noinline __u32 sctp_checksum_change(__u32 change, __u32 length)
{
	__u32 factor, product, shifted, taken, low;
	int i, bit;

#pragma clang loop unroll(disable)
	for (i = 0; i < CRC32C_POWERS; i++) {
		if (!(length >> i))
			break;
		factor = crc32c_powers[i];
		product = 0;
		shifted = change;
#pragma clang loop unroll(disable)
		for (bit = 31; bit >= 0; bit--) {
			low = shifted & 1;
			barrier_var(low); /* or the compiler makes branches of it */
			product ^= shifted * (factor >> bit & 1);
			shifted = shifted >> 1 ^ CRC32C_POLYNOMIAL * low;
		}
		/* No branch: the verifier would follow both ways at every step. */
		taken = length >> i & 1;
		barrier_var(taken);
		change = product * taken + change * (1 - taken);
	}
	return change;
}

#endif
