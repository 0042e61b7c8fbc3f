// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	observerpb "github.com/weirmesh/weir/gen/observer"
	labv1 "github.com/weirmesh/weir/gen/weir/lab/v1"
	observerv1 "github.com/weirmesh/weir/gen/weir/observer/v1"
	"github.com/weirmesh/weir/test/e2e/flowbench"
)

// followed is what the client process says at its end.
type followed struct {
	Flows, Lost uint64
}

// follow is the client process: it reads flows until its standard input closes.
func follow(ctx context.Context, server string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		_, _ = bufio.NewReader(os.Stdin).ReadByte()
		cancel()
	}()
	flows, lost, err := flowbench.Follow(ctx, server)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(followed{flows, lost})
}

const flowServer = "127.0.0.1:14246"

// flows is parts (b), (d) and (e): the whole flow path with real connections.
func (b bench) flows(ctx context.Context, d time.Duration, rates string) error {
	lab, down, err := b.lab(ctx, flowServer)
	if err != nil {
		return err
	}
	defer down()
	control, err := grpc.NewClient("unix:///run/weir/"+lab+"/lab.sock", grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer control.Close()
	state, err := labv1.NewLabServiceClient(control).GetLab(ctx, &labv1.GetLabRequest{})
	if err != nil {
		return err
	}
	conn, err := grpc.NewClient(flowServer, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)))
	if err != nil {
		return err
	}
	defer conn.Close()

	fmt.Printf("\nflow path, real connections from pod a (node1) to pods b (node1) and c (node2), aggregation medium, a client that decodes every flow\n")
	fmt.Println("memory at rest, MiB:", b.memory(state))
	for r := range strings.SplitSeq(rates, ",") {
		rate, err := strconv.Atoi(r)
		if err != nil {
			return fmt.Errorf("rate %q: %w", r, err)
		}
		if err := b.flowRun(ctx, conn, lab, state, rate, d); err != nil {
			return err
		}
	}
	return b.bare(ctx, conn)
}

func (b bench) memory(state *labv1.GetLabResponse) string {
	var out []string
	for _, p := range state.Parts {
		if mib, err := flowbench.RSS(int(p.Pid)); err == nil {
			out = append(out, fmt.Sprintf("%s %.0f", p.Name, mib))
		}
	}
	return strings.Join(out, ", ")
}

func (b bench) flowRun(ctx context.Context, conn *grpc.ClientConn, lab string, state *labv1.GetLabResponse, rate int, d time.Duration) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	client := exec.CommandContext(ctx, self, "follow", flowServer)
	client.Stderr = os.Stderr
	stdin, err := client.StdinPipe()
	if err != nil {
		return err
	}
	stdout, err := client.StdoutPipe()
	if err != nil {
		return err
	}
	if err := client.Start(); err != nil {
		return err
	}
	pids := map[string]int{"client": client.Process.Pid}
	for _, p := range state.Parts {
		pids[p.Name] = int(p.Pid)
	}
	time.Sleep(2 * time.Second) // the client's stream and the last run's final flows
	before, err := cpuOf(pids)
	if err != nil {
		return err
	}
	lossBefore, recvBefore, err := account(ctx, conn)
	if err != nil {
		return err
	}
	type result struct {
		out []byte
		err error
	}
	results := make(chan result, 2)
	for _, to := range []string{"10.244.1.102", "10.244.2.103"} {
		go func() {
			out, err := b.exec(ctx, lab, "default/a", b.tool(), "load", to, strconv.Itoa(rate/2), d.String())
			results <- result{out, err}
		}()
	}
	made := 0
	for range 2 {
		r := <-results
		n, err := number(r.out, r.err)
		if err != nil {
			return fmt.Errorf("load at %d/s: %w", rate, err)
		}
		made += int(n)
	}
	time.Sleep(3 * time.Second) // what is under way arrives
	after, err := cpuOf(pids)
	if err != nil {
		return err
	}
	lossAfter, recvAfter, err := account(ctx, conn)
	if err != nil {
		return err
	}
	memory := b.memory(state)
	stdin.Close()
	var got followed
	if err := json.NewDecoder(stdout).Decode(&got); err != nil {
		return fmt.Errorf("client: %w", err)
	}
	if err := client.Wait(); err != nil {
		return err
	}
	flows := recvAfter - recvBefore
	fmt.Printf("\n%d connections/s asked, %.0f made; %d flows in %s = %.0f flows/s; lost on the way %d, by the client %d\n",
		rate, float64(made)/d.Seconds(), flows, d, float64(flows)/d.Seconds(), lossAfter-lossBefore, got.Lost)
	var names []string
	for n := range pids {
		names = append(names, n)
	}
	slices.Sort(names)
	total, perFlow := 0.0, func(n string) float64 { return float64((after[n] - before[n]).Microseconds()) / float64(max(flows, 1)) }
	for _, n := range names {
		fmt.Printf("  %-14s %6.2f us/flow   %4.1f %% of a core\n", n, perFlow(n), 100*(after[n]-before[n]).Seconds()/(d.Seconds()+3))
		total += perFlow(n)
	}
	fmt.Printf("  %-14s %6.2f us/flow\n  memory, MiB: %s\n", "all", total, memory)
	return nil
}

func cpuOf(pids map[string]int) (map[string]time.Duration, error) {
	out := map[string]time.Duration{}
	for n, pid := range pids {
		d, err := flowbench.CPU(pid)
		if err != nil {
			return nil, err
		}
		out[n] = d
	}
	return out, nil
}

// account returns how many flows the observer reports lost and has received.
func account(ctx context.Context, conn *grpc.ClientConn) (lost, received uint64, err error) {
	l, err := observerv1.NewObserverServiceClient(conn).GetLosses(ctx, &observerv1.GetLossesRequest{})
	if err != nil {
		return 0, 0, err
	}
	for _, c := range l.Losses {
		lost += c.Count
	}
	for _, n := range l.Nodes {
		received += n.Received
	}
	return lost, received, nil
}

// bare measures the baseline with flows that the lab has just made.
func (b bench) bare(ctx context.Context, conn *grpc.ClientConn) error {
	stream, err := observerpb.NewObserverClient(conn).GetFlows(ctx, &observerpb.GetFlowsRequest{Number: 2000})
	if err != nil {
		return err
	}
	var sample []*observerpb.GetFlowsResponse
	for {
		m, err := stream.Recv()
		if err != nil {
			break
		}
		if m.GetFlow() != nil {
			sample = append(sample, m)
		}
	}
	if len(sample) == 0 {
		return fmt.Errorf("baseline: the observer has no flows")
	}
	per, err := flowbench.Bare(ctx, sample, 300_000)
	if err != nil {
		return err
	}
	fmt.Printf("\nbaseline: bare gRPC stream that encodes, sends, receives and decodes the same messages: %.2f us of CPU a message, both ends\n", float64(per.Nanoseconds())/1000)
	return nil
}
