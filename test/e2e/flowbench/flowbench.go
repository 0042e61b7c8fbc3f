// SPDX-License-Identifier: Apache-2.0

// Package flowbench measures the flow path: CPU and memory of each process while real connections make flows.
package flowbench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	observerpb "github.com/weirmesh/weir/gen/observer"
)

// CPU is the user and system time of a process so far.
func CPU(pid int) (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The second field is the name in parentheses and may hold spaces.
	fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+2:]))
	if len(fields) < 13 {
		return 0, fmt.Errorf("/proc/%d/stat: %d fields", pid, len(fields))
	}
	user, err1 := strconv.ParseInt(fields[11], 10, 64)
	system, err2 := strconv.ParseInt(fields[12], 10, 64)
	return time.Duration(user+system) * 10 * time.Millisecond, errors.Join(err1, err2) // USER_HZ is 100
}

// RSS is the resident memory of a process in MiB.
func RSS(pid int) (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kb, err := strconv.ParseFloat(strings.Fields(v)[0], 64)
			return kb / 1024, err
		}
	}
	return 0, fmt.Errorf("/proc/%d/status: no VmRSS", pid)
}

// Follow reads flows as they come until ctx ends, decodes every one, and returns how many flows and lost events there were.
func Follow(ctx context.Context, server string) (flows, lost uint64, err error) {
	// As the weir command does (cli/internal/observer): gRPC's first window of 64 KiB is some 70 flows.
	const window = 4 << 20
	conn, err := grpc.NewClient(server, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithInitialWindowSize(window), grpc.WithInitialConnWindowSize(window))
	if err != nil {
		return 0, 0, err
	}
	defer conn.Close()
	stream, err := observerpb.NewObserverClient(conn).GetFlows(ctx, &observerpb.GetFlowsRequest{Follow: true})
	if err != nil {
		return 0, 0, err
	}
	for {
		m, err := stream.Recv()
		if ctx.Err() != nil {
			return flows, lost, nil
		}
		if err != nil {
			return flows, lost, err
		}
		if m.GetFlow() != nil {
			flows++
		}
		lost += m.GetLostEvents().GetNumEventsLost()
	}
}

// Bare is the baseline: a gRPC stream over loopback that encodes, sends, receives and decodes the same messages n times in turn, and
// nothing else. It returns the CPU time of both ends together for each message.
func Bare(ctx context.Context, sample []*observerpb.GetFlowsResponse, n int) (time.Duration, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	srv := grpc.NewServer()
	observerpb.RegisterObserverServer(srv, &bareServer{sample: sample, n: n})
	go func() { _ = srv.Serve(ln) }()
	defer srv.Stop()
	conn, err := grpc.NewClient(ln.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	before := ownCPU()
	stream, err := observerpb.NewObserverClient(conn).GetFlows(ctx, &observerpb.GetFlowsRequest{})
	if err != nil {
		return 0, err
	}
	got := 0
	for {
		if _, err := stream.Recv(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return 0, err
		}
		got++
	}
	if got != n {
		return 0, fmt.Errorf("bare stream: %d of %d messages", got, n)
	}
	return (ownCPU() - before) / time.Duration(n), nil
}

func ownCPU() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

type bareServer struct {
	observerpb.UnimplementedObserverServer
	sample []*observerpb.GetFlowsResponse
	n      int
}

func (s *bareServer) GetFlows(_ *observerpb.GetFlowsRequest, stream grpc.ServerStreamingServer[observerpb.GetFlowsResponse]) error {
	for i := range s.n {
		if err := stream.Send(s.sample[i%len(s.sample)]); err != nil {
			return err
		}
	}
	return nil
}
