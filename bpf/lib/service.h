/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Which backend a client of a service gets: one decision for sockets and packets. */
#ifndef WEIR_SERVICE_H
#define WEIR_SERVICE_H

#include "config.h"
#include "ipcache.h"
#include "maps.h"

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536); /* sized */
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct service_key);
	__type(value, struct service);
} services SEC(".maps"); /* written: datapath.Services; read: socket hooks, tc programs */

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 262144); /* sized */
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct backend_key);
	__type(value, struct backend);
} backends SEC(".maps"); /* written: datapath.Services; read: socket hooks, tc programs */

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 262144); /* sized */
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct member_key);
	__type(value, __u32);
} members SEC(".maps"); /* slot; written: datapath.Services; read: socket hooks, tc programs */

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 65536); /* sized */
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct range_key);
	__type(value, __u32);
} source_ranges SEC(".maps"); /* written: datapath.Services; read: socket hooks, tc programs */

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536); /* sized */
	__type(key, struct affinity_key);
	__type(value, struct affinity_entry);
} affinity SEC(".maps"); /* written: socket hooks, tc programs; read: the same, and datapath.Services to sweep */

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct sock_choice);
} choices SEC(".maps"); /* written: socket hooks; read: the same, from_pod */

/* The greatest table: the loader makes it as big as configured. */
#define MAGLEV_SLOTS 16381

struct maglev_table {
	__u16 slots[MAGLEV_SLOTS];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384); /* sized */
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(key_size, sizeof(struct maglev_key));
	__uint(value_size, sizeof(struct maglev_table)); /* sized */
} maglev SEC(".maps"); /* slot of a backend, relative to the part that the table is of; written: datapath.Services;
			  read: tc programs */

#define SERVICE_STALE -1 /* the set was replaced between two looks: find the service again */
#define SERVICE_TRIES 3

static __always_inline bool service_lookup(const struct service_key *key, struct service *svc)
{
	struct service *row = bpf_map_lookup_elem(&services, key);

	if (!row)
		return false;
	*svc = *row;
	barrier();
	return row->check == service_check(key) && svc->check == row->check;
}

/* service_at_node says whether an address is one of a node: of this one, or of any. */
static __always_inline bool service_at_node(const struct addr *a, bool this_node)
{
	struct ipcache_entry *entry = ipcache_find(a);

	if (!entry)
		return false;
	if (entry->identity == IDENTITY_HOST)
		return true;
	return !this_node && (entry->identity == IDENTITY_REMOTE_NODE || (entry->flags & IPCACHE_NODE));
}

/* service_find copies the frontend that an address and port are of. Node ports have one row for all nodes' addresses:
 * that of the unspecified address. Outside: the packet came from another machine. */
static __always_inline bool service_find(const struct addr *dst, __be16 port, __u8 proto, bool outside,
					 struct service *svc)
{
	struct service_key key = {.addr = *dst, .port = port, .proto = proto};

	if (service_lookup(&key, svc))
		return true;
	key.addr.hi = 0;
	key.addr.lo = addr_is_v4(dst) ? ADDR_V4_PREFIX : 0;
	return service_lookup(&key, svc) && service_at_node(dst, outside);
}

static __always_inline bool service_admits(const struct service *svc, const struct addr *client)
{
	struct range_key key = {.prefixlen = 160, .service = bpf_htonl(svc->id)};

	if (!(svc->flags & SERVICE_RANGES))
		return true;
	__builtin_memcpy(key.addr, client, sizeof(key.addr));
	return bpf_map_lookup_elem(&source_ranges, &key);
}

/* service_slots gives the slots that new connections may take; it returns how many. */
static __always_inline __u32 service_slots(const struct service *svc, bool outside, __u32 *first, bool *local)
{
	*first = 0;
	*local = (svc->flags & SERVICE_LOCAL) || (outside && (svc->flags & SERVICE_LOCAL_OUTSIDE));
	if (!*local)
		return svc->ready ?: svc->total;
	if (svc->ready_local)
		return svc->ready_local;
	*first = svc->ready;
	return svc->terminating_local;
}

/* service_slot returns where a backend is in the set; false = nowhere. */
static __always_inline bool service_slot(const struct service *svc, const struct addr *backend, __be16 port,
					 __u32 *slot)
{
	struct member_key key = {.addr = *backend, .set = svc->set, .port = port};
	__u32 *found = bpf_map_lookup_elem(&members, &key);

	if (!found)
		return false;
	*slot = *found;
	return true;
}

/* service_eligible says whether a backend may get new connections. */
static __always_inline bool service_eligible(const struct service *svc, const struct addr *backend, __be16 port,
					     bool outside)
{
	__u32 first, count, slot;
	bool local;

	count = service_slots(svc, outside, &first, &local);
	return service_slot(svc, backend, port, &slot) && slot >= first && slot - first < count;
}

static __always_inline bool service_member(const struct service *svc, const struct addr *backend, __be16 port)
{
	__u32 slot;

	return service_slot(svc, backend, port, &slot);
}

struct choice {
	struct addr addr;
	__be16 port;
};

/* service_select chooses a backend for a new connection: 0, a drop reason or SERVICE_STALE. The hash is of the
 * connection, for Maglev's table; 0 = choose at random. */
static __always_inline int service_select(const struct service *svc, const struct addr *client, bool outside,
					  __u32 hash, struct choice *out)
{
	struct affinity_key who = {.client = *client, .group = svc->group};
	struct backend_key key = {.set = svc->set};
	struct affinity_entry *before = NULL;
	__u64 now = 0;
	__u32 first, count;
	struct backend *b;
	bool local;

	if (!service_admits(svc, client))
		return DROP_SOURCE_RANGE;
	count = service_slots(svc, outside, &first, &local);
	if (!count)
		return DROP_NO_BACKEND;
	if (svc->affinity) {
		now = bpf_ktime_get_ns();
		before = bpf_map_lookup_elem(&affinity, &who);
		if (before && now - before->time < svc->affinity * 1000000000ULL &&
		    service_eligible(svc, &before->backend, before->port, outside)) {
			out->addr = before->backend;
			out->port = before->port;
			before->time = now;
			return 0;
		}
	}
	if (hash && (svc->flags & (local ? SERVICE_MAGLEV_LOCAL : SERVICE_MAGLEV))) {
		struct maglev_key which = {.set = svc->set, .local = local};
		struct maglev_table *table = bpf_map_lookup_elem(&maglev, &which);

		hash %= cfg_maglev_size;
		barrier_var(hash); /* or the compiler takes the check away that the verifier wants */
		if (!table || hash >= cfg_maglev_size)
			return SERVICE_STALE;
		key.slot = first + table->slots[hash];
	} else {
		key.slot = first + bpf_get_prandom_u32() % count;
	}
	b = bpf_map_lookup_elem(&backends, &key);
	if (!b)
		return SERVICE_STALE;
	out->addr = b->addr;
	out->port = b->port;
	barrier();
	if (b->set != svc->set)
		return SERVICE_STALE;
	if (svc->affinity) {
		struct affinity_entry now_entry = {.backend = out->addr, .port = out->port, .time = now};

		bpf_map_update_elem(&affinity, &who, &now_entry, BPF_ANY);
	}
	return 0;
}

#endif
