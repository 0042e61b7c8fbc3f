// clang-format off
//go:build ignore
// clang-format on

// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// The socket hooks of the pods' cgroup: services are translated where a socket is told its destination, and local
// sockets say how their connections do.
#include "vmlinux.h"
#include "sock.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

// The verifier takes a write to the context only by its own pointer and a constant offset: values are read into locals,
// and written once.
static __always_inline void target_read4(struct bpf_sock_addr *ctx, struct target *t)
{
	addr_from_v4(&t->addr, ctx->user_ip4);
	t->port = (__be16)ctx->user_port;
	t->proto = ctx->protocol;
}

static __always_inline void target_write4(struct bpf_sock_addr *ctx, const struct target *t)
{
	__u32 ip = addr_v4(&t->addr), port = t->port;

	asm volatile("" : "+r"(ctx));
	((volatile struct bpf_sock_addr *)ctx)->user_ip4 = ip;
	((volatile struct bpf_sock_addr *)ctx)->user_port = port;
}

static __always_inline void target_read6(struct bpf_sock_addr *ctx, struct target *t)
{
	addr_from_words(&t->addr, ctx->user_ip6);
	t->port = (__be16)ctx->user_port;
	t->proto = ctx->protocol;
}

static __always_inline void target_write6(struct bpf_sock_addr *ctx, const struct target *t)
{
	__u32 a = (__u32)t->addr.hi, b = (__u32)(t->addr.hi >> 32), c = (__u32)t->addr.lo,
	      d = (__u32)(t->addr.lo >> 32), port = t->port;

	asm volatile("" : "+r"(ctx));
	((volatile struct bpf_sock_addr *)ctx)->user_ip6[0] = a;
	((volatile struct bpf_sock_addr *)ctx)->user_ip6[1] = b;
	((volatile struct bpf_sock_addr *)ctx)->user_ip6[2] = c;
	((volatile struct bpf_sock_addr *)ctx)->user_ip6[3] = d;
	((volatile struct bpf_sock_addr *)ctx)->user_port = port;
}

// refuse makes the call fail as one to a closed port does, where the kernel lets us choose; else with EPERM.
static __always_inline int refuse(void)
{
	if (cfg_set_retval)
		bpf_set_retval(-ECONNREFUSED);
	return SOCK_REFUSE;
}

static __always_inline int forward4(struct bpf_sock_addr *ctx, bool datagram)
{
	struct target t = {};

	target_read4(ctx, &t);
	switch (sock_translate(ctx, &t, datagram)) {
	case SOCK_TRANSLATED:
		target_write4(ctx, &t);
		break;
	case SOCK_REFUSED:
		return refuse();
	}
	return SOCK_ALLOW;
}

static __always_inline int forward6(struct bpf_sock_addr *ctx, bool datagram)
{
	struct target t = {};

	target_read6(ctx, &t);
	switch (sock_translate(ctx, &t, datagram)) {
	case SOCK_TRANSLATED:
		target_write6(ctx, &t);
		break;
	case SOCK_REFUSED:
		return refuse();
	}
	return SOCK_ALLOW;
}

static __always_inline int reverse4(struct bpf_sock_addr *ctx, bool datagram)
{
	struct target t = {};

	target_read4(ctx, &t);
	if (sock_reverse(ctx, &t, datagram))
		target_write4(ctx, &t);
	return SOCK_ALLOW;
}

static __always_inline int reverse6(struct bpf_sock_addr *ctx, bool datagram)
{
	struct target t = {};

	target_read6(ctx, &t);
	if (sock_reverse(ctx, &t, datagram))
		target_write6(ctx, &t);
	return SOCK_ALLOW;
}

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx)
{
	return forward4(ctx, false);
}

SEC("cgroup/connect6")
int connect6(struct bpf_sock_addr *ctx)
{
	return forward6(ctx, false);
}

SEC("cgroup/sendmsg4")
int sendmsg4(struct bpf_sock_addr *ctx)
{
	return forward4(ctx, true);
}

SEC("cgroup/sendmsg6")
int sendmsg6(struct bpf_sock_addr *ctx)
{
	return forward6(ctx, true);
}

SEC("cgroup/recvmsg4")
int recvmsg4(struct bpf_sock_addr *ctx)
{
	return reverse4(ctx, true);
}

SEC("cgroup/recvmsg6")
int recvmsg6(struct bpf_sock_addr *ctx)
{
	return reverse6(ctx, true);
}

SEC("cgroup/getpeername4")
int getpeername4(struct bpf_sock_addr *ctx)
{
	return reverse4(ctx, false);
}

SEC("cgroup/getpeername6")
int getpeername6(struct bpf_sock_addr *ctx)
{
	return reverse6(ctx, false);
}

SEC("sockops")
int sock_ops(struct bpf_sock_ops *ops)
{
	switch (ops->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		// From here on, so that a connect that fails shows its retransmissions.
		bpf_sock_ops_cb_flags_set(ops, BPF_SOCK_OPS_RETRANS_CB_FLAG | BPF_SOCK_OPS_RTT_CB_FLAG);
		sock_connecting(ops);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		bpf_sock_ops_cb_flags_set(ops, BPF_SOCK_OPS_RETRANS_CB_FLAG | BPF_SOCK_OPS_RTT_CB_FLAG);
		sock_measured(ops, 0);
		break;
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
	case BPF_SOCK_OPS_RTT_CB:
		sock_measured(ops, 0);
		break;
	case BPF_SOCK_OPS_RETRANS_CB:
		// args: sequence number, segments, error
		sock_measured(ops, ops->args[2] ? 0 : ops->args[1]);
		break;
	}
	return 1;
}
