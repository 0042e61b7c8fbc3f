//go:build ignore

// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
#include "vmlinux.h"
#include "events.h"
#include "exported.h"
#include "maps.h"
#include "nat_types.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";


SEC("tc") int from_pod(struct __sk_buff *skb) { return 0; }
