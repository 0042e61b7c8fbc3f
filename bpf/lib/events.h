/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The rings: one per CPU, since one ring costs eight times as much as soon as two CPUs write to it. */
#ifndef WEIR_EVENTS_H
#define WEIR_EVENTS_H

#include "config.h"
#include "metrics.h"
#include "record.h"

#define MAX_RINGS 256

struct ring {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20); /* sized */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, MAX_RINGS); /* sized */
	__type(key, __u32);
	__array(values, struct ring);
} events SEC(".maps"); /* written: all programs; read: datapath.Rings */

/* flowstate: how far the agent has come; see datapath.State. */
struct flowstate {
	__u64 epoch;
	__u64 next_sequence;
	__u64 reserved[6];
	__u64 positions[MAX_RINGS];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct flowstate);
} flowstate SEC(".maps"); /* written and read: datapath.Rings; no program touches it */

/* events_write copies a record to this CPU's ring. Every record is counted, as written or as lost. The reader is woken
 * when the fill crosses a threshold, never else: it also looks by itself every few milliseconds, and a wake-up per
 * record costs more than the record. */
static __always_inline bool events_write(struct record *r)
{
	__u32 cpu = bpf_get_smp_processor_id();
	void *ring = bpf_map_lookup_elem(&events, &cpu);
	bool verdict = r->type == RECORD_VERDICT;
	__u32 index = r->type - RECORD_TRACE;
	__u64 fill, flags = BPF_RB_NO_WAKEUP;

	if (ring) {
		fill = bpf_ringbuf_query(ring, BPF_RB_AVAIL_DATA);
		if (fill < cfg_wakeup_bytes && fill + sizeof(*r) + 8 >= cfg_wakeup_bytes)
			flags = BPF_RB_FORCE_WAKEUP;
		if (!bpf_ringbuf_output(ring, r, sizeof(*r), flags)) {
			metric_add(verdict ? METRIC_WRITTEN_VERDICT : METRIC_WRITTEN_TRACE + index, 1, 0);
			return true;
		}
	}
	metric_add(verdict ? METRIC_LOST_VERDICT : METRIC_LOST_TRACE + index, 1, 0);
	return false;
}

#endif
