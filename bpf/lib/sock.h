/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Services at the socket: the address is translated once, when the socket is told where to go, and never in a packet.
 */
#ifndef WEIR_SOCK_H
#define WEIR_SOCK_H

#include "ct_key.h"
#include "events.h"
#include "maps.h"
#include "drop_types.h"
#include "service.h"

#define SOCK_REFUSE 0
#define SOCK_ALLOW  1

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

static __always_inline bool sock_find(const struct target *t, struct service *svc)
{
	return service_find(&t->addr, t->port, t->proto, false, svc);
}

/* sock_client says who a socket is to services: its pod by address, so that packets and sockets of a pod are one
 * client; else its network namespace. */
static __always_inline struct netns_endpoint *sock_client(struct bpf_sock_addr *ctx, bool v4, struct addr *client)
{
	__u64 cookie = bpf_get_netns_cookie(ctx);
	struct netns_endpoint *owner = bpf_map_lookup_elem(&netns, &cookie);

	client->hi = cookie;
	client->lo = 0;
	if (owner)
		*client = v4 ? owner->v4 : owner->v6;
	return owner;
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

/* sock_refused tells of a call to a service that has no backend for this client. No packet will: the call fails. */
static __always_inline void sock_refused(struct bpf_sock_addr *ctx, const struct target *t, const struct service *svc,
					 __u32 reason)
{
	struct drop_value zero = {}, *row;
	struct drop_key key = {};
	struct netns_endpoint *owner;
	__u32 cpu = bpf_get_smp_processor_id();
	void *ring = bpf_map_lookup_elem(&events, &cpu);
	struct addr client;
	struct record *r;

	owner = sock_client(ctx, addr_is_v4(&t->addr), &client);
	key.peer_identity = identity_find(&t->addr);
	key.endpoint = owner ? owner->id : 0;
	key.port = t->port;
	key.direction = DIRECTION_EGRESS;
	key.proto = t->proto;
	key.reason = reason;
	row = bpf_map_lookup_elem(&drops, &key);
	if (!row) {
		bpf_map_update_elem(&drops, &key, &zero, BPF_NOEXIST);
		row = bpf_map_lookup_elem(&drops, &key);
	}
	if (row) {
		__sync_fetch_and_add(&row->records, 1);
		__sync_fetch_and_add(&row->packets, 1);
	} else {
		metric_add(METRIC_DROPS_OVERFLOW, 1, 0);
	}
	r = ring ? bpf_ringbuf_reserve(ring, sizeof(*r), 0) : NULL;
	if (!r) {
		metric_add(METRIC_LOST_DROP, 1, 0);
		return;
	}
	__builtin_memset(r, 0, sizeof(*r));
	r->time = bpf_ktime_get_ns();
	r->type = RECORD_DROP;
	r->dst = t->addr;
	r->dport = bpf_ntohs(t->port);
	r->service = svc->id;
	r->socket_cookie = bpf_get_socket_cookie(ctx);
	r->cgroup_id = bpf_get_current_cgroup_id();
	r->direction = DIRECTION_EGRESS;
	r->reason = reason;
	r->proto = t->proto;
	r->ip_version = addr_is_v4(&t->addr) ? 4 : 6;
	r->dst_identity = key.peer_identity;
	r->forward.packets = 1;
	r->forward.first = r->forward.last = r->time;
	if (owner) {
		r->src = client;
		r->endpoint = owner->id;
		r->src_identity = owner->identity;
		r->ifindex = owner->ifindex;
	}
	bpf_ringbuf_submit(r, BPF_RB_NO_WAKEUP);
	metric_add(METRIC_WRITTEN_DROP, 1, 0);
}

enum sock_result {
	SOCK_AS_IS = 0,
	SOCK_TRANSLATED = 1,
	SOCK_REFUSED = 2,
};

/* sock_translate replaces a service address by a backend's. */
static __always_inline int sock_translate(struct bpf_sock_addr *ctx, struct target *t, bool datagram)
{
	struct bpf_sock *sk = ctx->sk;
	struct sock_choice *choice;
	struct service svc;
	struct addr client = {};
	struct choice got = {};
	bool again = false;
	__u16 local_port;
	int i, reason = DROP_NO_BACKEND;

	if (!sk)
		return SOCK_AS_IS;
	choice = bpf_sk_storage_get(&choices, sk, NULL, 0);
	/* A pod's connection to a service with a route begins with the route. */
	if (!sock_find(t, &svc) || (svc.kind >> 16 && t->proto == IPPROTO_TCP && sock_client(ctx, true, &client))) {
		if (choice && !datagram)
			bpf_sk_storage_delete(&choices, sk);
		return SOCK_AS_IS;
	}
	if (!choice)
		choice = bpf_sk_storage_get(&choices, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!choice)
		return SOCK_AS_IS;
	/* An unconnected socket stays with its backend while that is in the set. */
	if (datagram && choice->service == svc.id && choice->vip_port == t->port &&
	    addr_equal(&choice->vip, &t->addr) &&
	    (choice->set == svc.set || service_member(&svc, &choice->backend, choice->backend_port))) {
		choice->set = svc.set;
		again = true;
	} else {
		if (svc.affinity || (svc.flags & SERVICE_RANGES))
			sock_client(ctx, addr_is_v4(&t->addr), &client);
#pragma clang loop unroll(disable)
		for (i = 0; i < SERVICE_TRIES; i++) {
			reason = service_select(&svc, &client, false, 0, &got);
			if (reason != SERVICE_STALE || !sock_find(t, &svc))
				break;
		}
		if (reason) {
			choice->set = 0;
			choice->service = 0;
			sock_refused(ctx, t, &svc, reason == SERVICE_STALE ? DROP_NO_BACKEND : reason);
			return SOCK_REFUSED;
		}
		choice->vip = t->addr;
		choice->vip_port = t->port;
		choice->backend = got.addr;
		choice->backend_port = got.port;
		choice->service = svc.id;
		choice->set = svc.set;
		choice->connected = !datagram && t->proto == IPPROTO_UDP;
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
	return SOCK_TRANSLATED;
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
