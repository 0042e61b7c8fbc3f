/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Collecting entries. The agent finds candidates and runs this program on them (BPF_PROG_TEST_RUN); the final record
 * and the deletion happen in one run, which ends even if the agent dies. So a final record is written once, and is in
 * the ring or the entry in ct. */
#ifndef WEIR_SWEEP_H
#define WEIR_SWEEP_H

#include "ct.h"
#include "nat.h"

#define SWEEP_KEYS 64

enum sweep_result {
	SWEEP_LIVE = 0, /* not due, or gone */
	SWEEP_DONE = 1,
	SWEEP_FULL = 2, /* no room in the ring */
};

/* sweep_request is the packet of a run; keys follow it. */
struct sweep_request {
	__u8 ethernet[14];
	__u16 count;
	__u64 half_open_before; /* collect half-open entries that were silent since; 0 = only what has expired */
	__u8 force;		/* collect whatever is named */
	__u8 pad[7];
};

/* sweep_one collects the entry whose key is at an offset of the packet. */
__noinline int sweep_one(struct __sk_buff *skb, __u32 offset, __u64 now, __u64 half_open_before, __u32 force)
{
	__u32 cpu = bpf_get_smp_processor_id();
	struct ct_key key;
	struct ct_entry *entry;
	struct ct_conn *e;
	struct record *r;
	__u64 last, fill, flags = BPF_RB_NO_WAKEUP;
	void *ring;
	bool due, blank, masqueraded, local_is_lo;

	if (bpf_skb_load_bytes(skb, offset, &key, sizeof(key)))
		return SWEEP_LIVE;
	entry = bpf_map_lookup_elem(&ct, &key);
	if (!entry)
		return SWEEP_LIVE;
	e = &entry->conn;
	ring = bpf_map_lookup_elem(&events, &cpu);
	if (!ring)
		return SWEEP_FULL;
	fill = bpf_ringbuf_query(ring, BPF_RB_AVAIL_DATA);
	if (fill < cfg_wakeup_bytes && fill + sizeof(*r) + 8 >= cfg_wakeup_bytes)
		flags = BPF_RB_FORCE_WAKEUP;
	/* Room first: an entry is not given up for a record that cannot be written. */
	r = bpf_ringbuf_reserve(ring, sizeof(*r), 0);
	if (!r)
		return SWEEP_FULL;
	bpf_spin_lock(&entry->lock);
	last = e->dir[0].last > e->dir[1].last ? e->dir[0].last : e->dir[1].last;
	due = force || now > e->expires ||
	      ((e->state == CT_SYN_SENT || e->state == CT_SYN_RECV) && last < half_open_before);
	blank = e->state == CT_NONE;
	if (blank || e->state == CT_DEAD || e->tail != ct_tail(&key))
		due = false;
	if (due)
		ct_snapshot(r, e);
	if (due || blank)
		e->state = CT_DEAD;
	bpf_spin_unlock(&entry->lock);
	if (!due) {
		bpf_ringbuf_discard(r, BPF_RB_NO_WAKEUP);
		if (blank) /* no connection has begun in it: who wants to begin one makes another */
			bpf_map_delete_elem(&ct, &key);
		return SWEEP_LIVE;
	}
	masqueraded = r->flags & CT_MASQUERADE;
	local_is_lo = r->flags & CT_LO_IS_LOCAL;
	ct_final(r, &key, now);
	bpf_ringbuf_submit(r, flags);
	metric_add(METRIC_WRITTEN_FINAL, 1, 0);
	bpf_map_delete_elem(&ct, &key);
	if (masqueraded) {
		struct nat_key out = {
		    .src = local_is_lo ? key.lo : key.hi,
		    .dst = local_is_lo ? key.hi : key.lo,
		    .sport = local_is_lo ? key.lo_port : key.hi_port,
		    .dport = local_is_lo ? key.hi_port : key.lo_port,
		    .proto = key.proto,
		    .kind = NAT_OUT,
		};

		nat_release(&out);
	}
	return SWEEP_DONE;
}

/* sweep returns the entries collected, and those left since the ring was full in the upper half. */
SEC("tc")
int sweep(struct __sk_buff *skb)
{
	struct sweep_request request;
	__u64 now = bpf_ktime_get_ns();
	__u32 i, done = 0, left = 0;
	int result;

	if (bpf_skb_load_bytes(skb, 0, &request, sizeof(request)))
		return 0;
#pragma clang loop unroll(disable)
	for (i = 0; i < SWEEP_KEYS; i++) {
		if (i >= request.count)
			break;
		result = sweep_one(skb, sizeof(request) + i * sizeof(struct ct_key), now, request.half_open_before,
				   request.force);
		if (result == SWEEP_DONE)
			done++;
		else if (result == SWEEP_FULL)
			left++;
	}
	return done | left << 16;
}

#endif
