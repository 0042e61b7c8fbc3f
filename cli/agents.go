// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/weirmesh/weir/cli/internal/printer"
	"github.com/weirmesh/weir/cli/internal/rundir"
	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
	labv1 "github.com/weirmesh/weir/gen/weir/lab/v1"
)

// nodeFlags are the flags of the commands that ask agents.
type nodeFlags struct {
	nodes  []string
	output string
}

func (f *nodeFlags) register(cmd *cobra.Command) {
	cmd.Flags().StringSliceVar(&f.nodes, "node", nil, "Nodes to ask; without it all")
	cmd.Flags().StringVarP(&f.output, "output", "o", "table", "Output format: table, json")
	complete(cmd, map[string][]string{"output": {"table", "json"}})
}

func (f *nodeFlags) check() error {
	if f.output != "table" && f.output != "json" {
		return fmt.Errorf("unknown output format: %s, expected table or json", f.output)
	}
	return nil
}

// fromNode is something an agent sent.
type fromNode[T any] struct {
	node  string
	value T
}

// ask calls the agents of the chosen nodes side by side and returns what they
// send in the order of the nodes. Those that fail are told on stderr; the
// error then names them, and the rest is still returned.
func ask[T any](ctx context.Context, a *app, f *nodeFlags, call func(context.Context, agentv1.AgentServiceClient) ([]T, error)) ([]fromNode[T], error) {
	if err := f.check(); err != nil {
		return nil, err
	}
	agents, err := a.agents(f.nodes)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, a.server.RequestTimeout)
	defer cancel()
	values, failures := make([][]T, len(agents)), make([]error, len(agents))
	var wg sync.WaitGroup
	for i, agent := range agents {
		wg.Go(func() { values[i], failures[i] = askOne(ctx, agent, call) })
	}
	wg.Wait()
	var out []fromNode[T]
	var failed []string
	for i, agent := range agents {
		if failures[i] != nil {
			fmt.Fprintln(a.Err, printer.Safe(failures[i].Error()))
			failed = append(failed, nodeName(agent))
		}
		for _, v := range values[i] {
			out = append(out, fromNode[T]{nodeName(agent), v})
		}
	}
	if len(failed) > 0 {
		return out, fmt.Errorf("no answer from %s", strings.Join(failed, ", "))
	}
	return out, nil
}

func askOne[T any](ctx context.Context, agent rundir.Socket, call func(context.Context, agentv1.AgentServiceClient) ([]T, error)) ([]T, error) {
	conn, err := agent.Dial()
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	values, err := call(ctx, agentv1.NewAgentServiceClient(conn))
	if err != nil {
		return nil, explainSocket(agent, err)
	}
	return values, nil
}

// explainSocket says why a part does not answer on its socket.
func explainSocket(s rundir.Socket, err error) error {
	if s.Missing {
		return fmt.Errorf("%s does not run: %s is missing", s.Name(), s.Path)
	}
	st := status.Convert(err)
	switch st.Code() {
	case codes.Unavailable:
		if os.Geteuid() != 0 {
			return fmt.Errorf("%s does not answer at %s, which is for root only: %s", s.Name(), s.Path, st.Message())
		}
		return fmt.Errorf("%s does not answer at %s: %s", s.Name(), s.Path, st.Message())
	case codes.Unimplemented:
		return fmt.Errorf("%s lacks this call: %s", s.Name(), st.Message())
	case codes.DeadlineExceeded:
		return fmt.Errorf("%s did not answer in time at %s", s.Name(), s.Path)
	}
	return fmt.Errorf("%s: %s", s.Name(), st.Message())
}

// agents returns the sockets of the agents of the named nodes, or of all.
func (a *app) agents(nodes []string) ([]rundir.Socket, error) {
	place, err := rundir.Find(a.runDir, a.lab)
	if err != nil {
		return nil, err
	}
	all := place.Agents()
	if len(all) == 0 {
		return nil, fmt.Errorf("no node of lab %s has an agent", place.Lab)
	}
	if len(nodes) == 0 {
		return all, nil
	}
	var known []string
	for _, s := range all {
		known = append(known, nodeName(s))
	}
	var out []rundir.Socket
	var faults []error
	for _, n := range nodes {
		i := slices.Index(known, n)
		if i < 0 {
			faults = append(faults, fmt.Errorf("no node %q; there are: %s", n, strings.Join(known, ", ")))
			continue
		}
		out = append(out, all[i])
	}
	return out, errors.Join(faults...)
}

// nodeName of an agent's socket; in a cluster the node is this machine.
func nodeName(s rundir.Socket) string {
	if s.Node != "" {
		return s.Node
	}
	if host, err := os.Hostname(); err == nil {
		return host
	}
	return "local"
}

// askLab asks the lab's supervisor what runs.
func (a *app) askLab(ctx context.Context, place rundir.Place) (*labv1.GetLabResponse, error) {
	s := place.Central("lab")
	conn, err := s.Dial()
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, a.server.RequestTimeout)
	defer cancel()
	lab, err := labv1.NewLabServiceClient(conn).GetLab(ctx, &labv1.GetLabRequest{})
	if err != nil {
		return nil, explainSocket(s, err)
	}
	return lab, nil
}
