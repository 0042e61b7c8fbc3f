/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Types that Go needs by name and that no map or program signature mentions. */
#ifndef WEIR_EXPORTED_H
#define WEIR_EXPORTED_H

#include "ct_types.h"
#include "drop_types.h"
#include "endpoint_types.h"
#include "metrics.h"
#include "policy_types.h"
#include "lb_state.h"
#include "service_types.h"
#include "upgrade.h"

struct exported {
	struct record record;
	enum record_type record_type;
	enum trace_point trace_point;
	enum trace_reason trace_reason;
	enum direction direction;
	enum known_bits known_bits;
	enum record_flags record_flags;
	enum drop_reason drop_reason;
	struct ct_conn ct_conn;
	enum ct_state ct_state;
	enum ct_flags ct_flags;
	enum ipcache_flags ipcache_flags;
	enum identity identity;
	enum metric metric;
	enum policy_verdict policy_verdict;
	enum service_flags service_flags;
	enum nat_kind nat_kind;
	enum lb_flags lb_flags;
	struct adopt_request adopt_request;
	enum adopt_kind adopt_kind;
	enum adopt_result adopt_result;
};

const struct exported *exported_types __attribute__((unused));

#endif
