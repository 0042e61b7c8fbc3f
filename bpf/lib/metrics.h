/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Counters that are always right, whatever the rings do. */
#ifndef WEIR_METRICS_H
#define WEIR_METRICS_H

#include "addr.h"

enum metric {
	METRIC_WRITTEN_TRACE = 0, /* records written, by type */
	METRIC_WRITTEN_DROP,
	METRIC_WRITTEN_TRANSLATION,
	METRIC_WRITTEN_FINAL,
	METRIC_LOST_TRACE, /* records that found the ring full, by type */
	METRIC_LOST_DROP,
	METRIC_LOST_TRANSLATION,
	METRIC_LOST_FINAL,
	METRIC_CT_CREATED,	      /* entries made; = finals written + finals unreported + live entries */
	METRIC_CT_FULL,		      /* connections refused since ct was full (bytes: of their packets) */
	METRIC_CT_UNREPORTED,	      /* taken over while the ring was full: connections */
	METRIC_CT_UNREPORTED_TRAFFIC, /* their packets (count) and bytes */
	METRIC_CT_UNCOUNTED,	      /* packets that met an entry being deleted, and are in no total */
	METRIC_DROPS_OVERFLOW,	      /* drops that found no row in the drops map */
	METRIC_ARP,
	METRIC_ND,
	METRIC_MULTICAST_CONTROL, /* MLD, IGMP and router solicitations of pods: dropped, no flow */
	METRIC_BYPASSED,	  /* packets that came round to a pod without passing an ingress hook: dropped */
	METRIC_NAT_CLAIMED,	  /* masquerading ports claimed */
	METRIC_WRITTEN_VERDICT,	  /* with the records above; here since the rows above keep their places */
	METRIC_LOST_VERDICT,
	METRIC_POLICY_ALLOWED_IN, /* connections decided, by direction: audited ones are allowed */
	METRIC_POLICY_ALLOWED_OUT,
	METRIC_POLICY_DENIED_IN,
	METRIC_POLICY_DENIED_OUT,
	METRIC_PROXY_REDIRECTED,  /* connections that began on a slot */
	METRIC_PROXY_NO_LISTENER, /* packets dropped: they would have begun a connection on a slot without listener */
	METRIC_PROXY_NOT_SEEN,	  /* connections only to be seen that went straight on, for the same reason */
	METRIC_PROXY_LOST,	  /* packets dropped: the proxy has no socket for their connection any more */
	METRIC_PROXY_MOVED,	  /* packets that met a change of slot: their connection is reset */
	METRIC_PROXY_UPSTREAM,	  /* packets given to upstream sockets of the proxy */
	METRICS,
	METRIC_ROOM = 64, /* so that new ones need no new layout */
};

struct metric_value {
	__u64 count;
	__u64 bytes;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, METRIC_ROOM);
	__type(key, __u32);
	__type(value, struct metric_value);
} metrics SEC(".maps"); /* written: programs; read: datapath.Counters */

static __always_inline void metric_add(__u32 index, __u64 count, __u64 bytes)
{
	struct metric_value *v = bpf_map_lookup_elem(&metrics, &index);

	/* Atomic although per CPU: a socket hook can be interrupted by a packet. */
	if (v) {
		__sync_fetch_and_add(&v->count, count);
		if (bytes)
			__sync_fetch_and_add(&v->bytes, bytes);
	}
}

#endif
