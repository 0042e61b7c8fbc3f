/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Taking over from programs of another layout. The agent copies what their maps hold, replaces the programs, and then
 * runs this program on what the old ones have still counted meanwhile, so that totals stay exact. */
#ifndef WEIR_UPGRADE_H
#define WEIR_UPGRADE_H

#include "ct.h"

enum adopt_kind {
	ADOPT_METRIC = 0, /* add count and bytes to a metric */
	ADOPT_CONN = 1,	  /* bring a copied connection up to date */
};

enum adopt_result {
	ADOPT_DONE = 0,
	ADOPT_ABSENT = 1, /* no entry: the agent makes it */
	ADOPT_FAILED = 2,
};

/* adopt_request is the packet of a run. */
struct adopt_request {
	__u8 ethernet[14];
	__u8 kind; /* enum adopt_kind */
	__u8 pad;
	__u32 metric;
	__u32 pad2;
	__u64 count;
	__u64 bytes;
	struct ct_key key;
	__u64 last[2];		 /* of the copy */
	struct traffic added[2]; /* since the copy */
	struct ct_conn conn;	 /* as it is now */
};

/* adopt_note is what a request is read into: too large for the stack. */
struct adopt_note {
	struct adopt_request request;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct adopt_note);
} adopt_notes SEC(".maps"); /* written and read: adopt; not pinned */

SEC("tc")
int adopt(struct __sk_buff *skb)
{
	struct adopt_request *r;
	struct adopt_note *note;
	struct ct_entry *entry;
	struct ct_conn *e;
	__u64 packets, bytes;
	bool other = false;
	__u32 zero = 0;
	int i;

	note = bpf_map_lookup_elem(&adopt_notes, &zero);
	if (!note)
		return ADOPT_FAILED;
	r = &note->request;
	if (bpf_skb_load_bytes(skb, 0, r, sizeof(*r)))
		return ADOPT_FAILED;
	if (r->kind == ADOPT_METRIC) {
		metric_add(r->metric, r->count, r->bytes);
		return ADOPT_DONE;
	}
	entry = bpf_map_lookup_elem(&ct, &r->key);
	if (!entry)
		return ADOPT_ABSENT;
	e = &entry->conn;
	bpf_spin_lock(&entry->lock);
	if (e->connection != r->conn.connection || e->state == CT_DEAD || e->state == CT_NONE) {
		other = true;
	} else if (e->dir[0].last == r->last[0] && e->dir[1].last == r->last[1]) {
		*e = r->conn; /* only the old programs have seen it */
	} else {
#pragma clang loop unroll(full)
		for (i = 0; i < 2; i++) {
			e->dir[i].packets += r->added[i].packets;
			e->dir[i].bytes += r->added[i].bytes;
			if (r->conn.dir[i].first && (!e->dir[i].first || r->conn.dir[i].first < e->dir[i].first))
				e->dir[i].first = r->conn.dir[i].first;
		}
	}
	bpf_spin_unlock(&entry->lock);
	if (other) { /* its final record is written */
		packets = r->added[0].packets + r->added[1].packets;
		bytes = r->added[0].bytes + r->added[1].bytes;
		metric_add(METRIC_CT_UNCOUNTED, packets, bytes);
	}
	return ADOPT_DONE;
}

#endif
