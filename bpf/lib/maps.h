/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The maps that more than one feature reads. Sizes marked "sized" are set by the loader. */
#ifndef WEIR_MAPS_H
#define WEIR_MAPS_H

#include "ct_types.h"
#include "drop_types.h"
#include "endpoint_types.h"
#include "policy_types.h"
#include "service_types.h"

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 262144); /* sized */
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct ct_key);
	__type(value, struct ct_entry);
} ct SEC(".maps"); /* written: tc programs, sweep, sockops; read: datapath.Conntrack */

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024); /* sized */
	__type(key, struct addr);
	__type(value, struct endpoint);
} endpoints SEC(".maps"); /* written: datapath.Endpoints; read: all programs */

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024); /* sized */
	__type(key, __u32);
	__type(value, struct endpoint);
} interfaces SEC(
    ".maps"); /* host-side ifindex; written: datapath.Endpoints; read: from_pod, for packets with a foreign source */

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 65536); /* sized */
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct ipcache_key);
	__type(value, struct ipcache_entry);
} ipcache SEC(".maps"); /* written: datapath.IPCache; read: tc programs */

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384); /* sized */
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct drop_key);
	__type(value, struct drop_value);
} drops SEC(".maps"); /* written: tc programs; read: datapath.Counters */

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct svcconn_key);
	__type(value, struct svcconn_note);
} svcconn SEC(".maps"); /* written: socket hooks, sockops; read: from_pod when it makes a ct entry */

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024); /* sized */
	__type(key, __u64);
	__type(value, struct netns_endpoint);
} netns SEC(".maps"); /* cookie; written: datapath.Endpoints; read: socket hooks */

#endif
