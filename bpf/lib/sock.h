/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Services at the socket: the address is translated once, when the socket is told where to go, and never in a packet.
 */
#ifndef WEIR_SOCK_H
#define WEIR_SOCK_H

#include "ct_key.h"
#include "events.h"
#include "maps.h"

#define SOCK_ALLOW 1

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct sock_choice);
} choices SEC(".maps"); /* written and read: socket hooks, sockops */

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct sockrev_key);
	__type(value, struct sockrev_value);
} sockrev SEC(".maps"); /* written: sendmsg; read: recvmsg */

/* target is an address as a socket call has it. */
struct target {
	struct addr addr;
	__be16 port;
	__u8 proto;
};

/* svc_select picks any backend of a service. */
static __always_inline struct backend *svc_select(const struct service *svc)
{
	struct backend_key key = {.set = svc->set};

	if (!svc->count)
		return NULL;
	key.slot = bpf_get_prandom_u32() % svc->count;
	return bpf_map_lookup_elem(&backends, &key);
}

static __always_inline struct service *svc_find(const struct target *t)
{
	struct service_key key = {.addr = t->addr, .port = t->port, .proto = t->proto};

	return bpf_map_lookup_elem(&services, &key);
}

/* sock_report writes a translation record: src may be unknown. */
static __always_inline void sock_report(const struct addr *src, __u16 sport, const struct netns_endpoint *owner,
					const struct sock_choice *choice, __u8 proto, __u64 cookie)
{
	__u32 cpu = bpf_get_smp_processor_id();
	void *ring = bpf_map_lookup_elem(&events, &cpu);
	struct record *r;

	r = ring ? bpf_ringbuf_reserve(ring, sizeof(*r), 0) : NULL;
	if (!r) {
		metric_add(METRIC_LOST_TRANSLATION, 1, 0);
		return;
	}
	__builtin_memset(r, 0, sizeof(*r));
	r->time = bpf_ktime_get_ns();
	r->type = RECORD_TRANSLATION;
	r->src = *src;
	r->sport = sport;
	r->dst = choice->vip;
	r->dport = bpf_ntohs(choice->vip_port);
	r->xlated = choice->backend;
	r->xlated_port = bpf_ntohs(choice->backend_port);
	r->service = choice->service;
	r->socket_cookie = cookie;
	r->cgroup_id = bpf_get_current_cgroup_id();
	r->direction = DIRECTION_EGRESS;
	r->proto = proto;
	r->ip_version = addr_is_v4(&choice->vip) ? 4 : 6;
	if (owner) {
		r->endpoint = owner->id;
		r->src_identity = owner->identity;
		r->ifindex = owner->ifindex;
	}
	bpf_ringbuf_submit(r, BPF_RB_NO_WAKEUP);
	metric_add(METRIC_WRITTEN_TRANSLATION, 1, 0);
}

/* sock_report_udp reports a translation of a UDP socket and notes its service for the ct entry to come. */
static __always_inline void sock_report_udp(struct bpf_sock_addr *ctx, const struct sock_choice *choice,
					    __u16 local_port)
{
	__u64 cookie = bpf_get_netns_cookie(ctx);
	struct netns_endpoint *owner = bpf_map_lookup_elem(&netns, &cookie);
	struct svcconn_key key = {.remote = choice->backend, .remote_port = choice->backend_port, .proto = IPPROTO_UDP};
	struct svcconn_note note = {.time = bpf_ktime_get_ns(), .service = choice->service};

	if (owner) {
		key.local = addr_is_v4(&choice->vip) ? owner->v4 : owner->v6;
		key.local_port = bpf_htons(local_port);
	}
	bpf_map_update_elem(&svcconn, &key, &note, BPF_ANY);
	sock_report(&key.local, local_port, owner, choice, IPPROTO_UDP, bpf_get_socket_cookie(ctx));
}

/* sock_translate replaces a service address by a backend's; it returns whether it did. */
static __always_inline bool sock_translate(struct bpf_sock_addr *ctx, struct target *t, bool datagram)
{
	struct bpf_sock *sk = ctx->sk;
	struct sock_choice *choice;
	struct service *svc;
	struct backend *b;
	bool again = false;
	__u16 local_port;

	if (!sk)
		return false;
	choice = bpf_sk_storage_get(&choices, sk, NULL, 0);
	svc = svc_find(t);
	if (!svc) {
		if (choice && !datagram)
			bpf_sk_storage_delete(&choices, sk);
		return false;
	}
	if (!choice)
		choice = bpf_sk_storage_get(&choices, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!choice)
		return false;
	/* An unconnected socket stays with its backend while the set is what it was. */
	if (datagram && choice->set == svc->set && choice->vip_port == t->port && addr_equal(&choice->vip, &t->addr)) {
		again = true;
	} else {
		b = svc_select(svc);
		if (!b) {
			/* The set was replaced between the two looks: the new one is there by now. */
			svc = svc_find(t);
			b = svc ? svc_select(svc) : NULL;
		}
		if (!b) {
			/* No backend: the packet keeps the service address, and from_pod drops it with that reason. */
			choice->set = 0;
			choice->service = 0;
			return false;
		}
		choice->vip = t->addr;
		choice->vip_port = t->port;
		choice->backend = b->addr;
		choice->backend_port = b->port;
		choice->service = svc->id;
		choice->set = svc->set;
	}
	if (datagram && !again) {
		struct sockrev_key key = {
		    .cookie = bpf_get_socket_cookie(ctx), .backend = choice->backend, .port = choice->backend_port};
		struct sockrev_value row = {.vip = choice->vip, .port = choice->vip_port, .service = choice->service};

		bpf_map_update_elem(&sockrev, &key, &row, BPF_ANY);
	}
	/* TCP is reported by sockops, where the socket's own address is known. */
	if (t->proto == IPPROTO_UDP && !again) {
		local_port = sk->src_port;
		sock_report_udp(ctx, choice, local_port);
	}
	t->addr = choice->backend;
	t->port = choice->backend_port;
	return true;
}

/* sock_reverse shows the service address instead of the backend's. A connected UDP socket can be asked for a datagram's
 * sender too. */
static __always_inline bool sock_reverse(struct bpf_sock_addr *ctx, struct target *t, bool datagram)
{
	struct bpf_sock *sk = ctx->sk;
	struct sock_choice *choice = sk ? bpf_sk_storage_get(&choices, sk, NULL, 0) : NULL;

	if (choice && choice->service && choice->backend_port == t->port && addr_equal(&choice->backend, &t->addr)) {
		t->addr = choice->vip;
		t->port = choice->vip_port;
		return true;
	}
	if (datagram) {
		struct sockrev_key key = {.cookie = bpf_get_socket_cookie(ctx), .backend = t->addr, .port = t->port};
		struct sockrev_value *row = bpf_map_lookup_elem(&sockrev, &key);

		if (row) {
			t->addr = row->vip;
			t->port = row->port;
			return true;
		}
	}
	return false;
}

/* sock_tuple reads the ends of a TCP socket. */
static __always_inline void sock_tuple(struct bpf_sock_ops *ops, struct svcconn_key *k)
{
	bool mapped = false;

	if (ops->family == AF_INET6) {
		addr_from_words(&k->remote, ops->remote_ip6);
		addr_from_words(&k->local, ops->local_ip6);
		mapped = addr_is_v4(&k->remote);
	} else {
		addr_from_v4(&k->remote, ops->remote_ip4);
	}
	/* An IPv6 socket that speaks IPv4 does not have its own mapped address yet when it connects. */
	if (mapped || ops->family != AF_INET6)
		addr_from_v4(&k->local, ops->local_ip4);
	k->local_port = bpf_htons((__u16)ops->local_port);
	k->remote_port = bpf_htons((__u16)bpf_ntohl(ops->remote_port));
	k->proto = IPPROTO_TCP;
}

/* sock_entry finds the ct entry at the observation point of the socket's own pod. */
static __always_inline struct ct_entry *sock_entry(const struct svcconn_key *k)
{
	struct endpoint *ep = bpf_map_lookup_elem(&endpoints, &k->local);
	struct ct_key key = {.proto = IPPROTO_TCP};

	if (!ep)
		return NULL;
	key.endpoint = ep->id;
	ct_key_make(&key, &k->local, &k->remote, k->local_port, k->remote_port);
	return bpf_map_lookup_elem(&ct, &key);
}

/* sock_connecting notes the service of a connection before its SYN leaves, and reports the translation. */
static __always_inline void sock_connecting(struct bpf_sock_ops *ops)
{
	struct svcconn_key key = {};
	struct bpf_sock *sk = ops->sk;
	struct sock_choice *choice;

	if (!sk)
		return;
	sock_tuple(ops, &key);
	choice = bpf_sk_storage_get(&choices, sk, NULL, 0);
	if (choice && choice->service) {
		struct svcconn_note note = {.time = bpf_ktime_get_ns(), .service = choice->service};
		struct endpoint *ep = bpf_map_lookup_elem(&endpoints, &key.local);
		struct netns_endpoint owner = {};

		if (ep) {
			owner.id = ep->id;
			owner.identity = ep->identity;
			owner.ifindex = ep->ifindex;
		}
		bpf_map_update_elem(&svcconn, &key, &note, BPF_ANY);
		sock_report(&key.local, bpf_ntohs(key.local_port), &owner, choice, IPPROTO_TCP,
			    bpf_get_socket_cookie(ops));
	} else if (bpf_map_lookup_elem(&svcconn, &key)) {
		bpf_map_delete_elem(&svcconn, &key); /* of an earlier connection with these ports */
	}
}

/* sock_measured puts what the socket knows of its path into the ct entry. */
static __always_inline void sock_measured(struct bpf_sock_ops *ops, __u32 retransmitted)
{
	struct svcconn_key key = {};
	__u32 srtt = ops->srtt_us >> 3;
	struct ct_entry *entry;

	sock_tuple(ops, &key);
	entry = sock_entry(&key);
	if (!entry)
		return;
	bpf_spin_lock(&entry->lock);
	if (srtt) {
		entry->conn.srtt_us = srtt;
		entry->conn.known |= KNOWN_SRTT;
	}
	entry->conn.retransmissions += retransmitted;
	entry->conn.known |= KNOWN_RETRANSMISSIONS;
	bpf_spin_unlock(&entry->lock);
}

#endif
