/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Connections of the programs before these, while hooks are replaced. */
#ifndef WEIR_CT_EARLIER_H
#define WEIR_CT_EARLIER_H

#include "ct_state.h"
#include "scratch.h"

#define EEXIST 17

/* ct_earlier is ct as the programs before these had it. They go on with it until the last hook has been replaced, so
 * that connections begin there whose answers come here. Not pinned. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1); /* sized; so is the value, which is as long as a layout's that is converted */
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct ct_key);
	__type(value, struct ct_template);
} ct_earlier SEC(".maps"); /* written: earlier programs; read: ct_carry, datapath's upgrade */

/* What every layout that is converted has in the same place. */
#define CT_EARLIER_SIZE 160
_Static_assert(__builtin_offsetof(struct ct_conn, rule) == CT_EARLIER_SIZE,
	       "the beginning of a connection is the same in all layouts");

/* ct_carry makes the entry of a connection that began at an earlier version's program, without its totals: the agent
 * adds them by adopt. CT_RETRY, or CT_MISS if there is no such connection. Policy decides anew. */
__noinline int ct_carry(void)
{
	struct scratch *s = scratch_get();
	struct ct_template *old;
	struct ct_conn *e;
	long err;

	if (!s || !cfg_ct_earlier)
		return CT_MISS;
	old = bpf_map_lookup_elem(&ct_earlier, &s->key);
	if (!old || old->conn.tail != ct_tail(&s->key) || old->conn.state == CT_NONE || old->conn.state == CT_DEAD ||
	    s->packet.now > old->conn.expires || (old->conn.state == CT_CLOSED && s->packet.starts))
		return CT_MISS;
	e = &s->blank.conn;
	__builtin_memcpy(e, &old->conn, CT_EARLIER_SIZE);
	e->dir[0].packets = e->dir[0].bytes = e->dir[0].last = 0;
	e->dir[1].packets = e->dir[1].bytes = e->dir[1].last = 0;
	if (cfg_ct_earlier == 1) /* see datapath/layout.go */
		e->policy_direction = e->direction;
	else
		e->rule = old->conn.rule; /* its slot */
	e->verdict = 0;
	e->generation = s->pass.generation - 1;
	err = bpf_map_update_elem(&ct, &s->key, &s->blank, BPF_NOEXIST);
	__builtin_memset(e, 0, sizeof(*e));
	return !err || err == -EEXIST ? CT_RETRY : CT_MISS;
}

volatile __u32 ct_takeover = 0; /* set until every hook has these programs */

/* ct_mirror shows a connection that has just begun here, without its totals, to the earlier programs, which may get its
 * answers. */
__noinline int ct_mirror(void)
{
	struct scratch *s = scratch_get();
	struct ct_entry *entry;
	struct ct_conn *e;

	if (!s)
		return 0;
	entry = bpf_map_lookup_elem(&ct, &s->key);
	if (!entry)
		return 0;
	e = &s->blank.conn;
	__builtin_memcpy(e, &entry->conn, CT_EARLIER_SIZE + sizeof(e->rule) + sizeof(e->generation));
	e->dir[0].packets = e->dir[0].bytes = e->dir[0].last = 0;
	e->dir[1].packets = e->dir[1].bytes = e->dir[1].last = 0;
	if (e->tail == ct_tail(&s->key) && e->state != CT_DEAD)
		bpf_map_update_elem(&ct_earlier, &s->key, &s->blank, BPF_NOEXIST);
	__builtin_memset(e, 0, sizeof(*e));
	return 0;
}

#endif
