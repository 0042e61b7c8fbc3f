// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/weirmesh/weir/cli/internal/printer"
	"github.com/weirmesh/weir/cli/internal/rundir"
	labv1 "github.com/weirmesh/weir/gen/weir/lab/v1"
)

type cleanupFlags struct {
	nodes []string
	yes   bool
}

func (a *app) cleanupCommand() *cobra.Command {
	f := &cleanupFlags{}
	cmd := &cobra.Command{
		Use: "cleanup [-- FLAGS OF WEIR-AGENT]", Short: "Take Weir out of the kernel of nodes, and leave plain routing",
		Long: `Take Weir out of the kernel: detach all programs, remove all maps, and leave pods with plain routing. After that there is
NO POLICY, no service translation, no masquerading and no flows, until an agent runs on the node again. An emergency exit for when the agent itself
cannot be trusted; when only policy is in the way, pause it (weir policy pause).

Without --yes it only says what it would do. In the lab it stops the agents first and works on all nodes, or those of --node.
On a node of a cluster it works on that node, whose agent must be stopped before; what follows -- goes to weir-agent cleanup, and must
be the agent's own --uplink, --bpffs, --state-dir where those are not the defaults.`,
		Example: `  weir cleanup
  weir cleanup --node node1 --yes
  weir cleanup --yes -- --uplink ens5`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 && cmd.ArgsLenAtDash() != 0 {
				return noArgs(cmd, args)
			}
			return a.cleanup(cmd.Context(), f, args)
		},
	}
	cmd.Flags().StringSliceVar(&f.nodes, "node", nil, "Nodes of the lab; without it all")
	cmd.Flags().BoolVar(&f.yes, "yes", false, "Do it")
	withoutVariable(cmd, "yes")
	return cmd
}

// cleaning is what is done on one node.
type cleaning struct {
	node string
	// stop asks the lab to end the agent first; nil = the agent must be down already.
	stop func(context.Context) error
	path string
	args []string
	does []string
}

func (a *app) cleanup(ctx context.Context, f *cleanupFlags, further []string) error {
	place, err := rundir.Find(a.runDir, a.lab)
	if errors.Is(err, rundir.ErrNone) {
		// The agent is down, as it must be; its socket went with it.
		place, err = rundir.Place{Dir: a.runDir}, nil
	}
	if err != nil {
		return err
	}
	var all []cleaning
	if place.Lab == "" {
		all, err = a.cleanNode(place, f, further)
	} else {
		all, err = a.cleanLab(place, f, further)
	}
	if err != nil {
		return err
	}
	for _, c := range all {
		fmt.Fprintf(a.Out, "On %s:\n", printer.Safe(c.node))
		for _, line := range c.does {
			fmt.Fprintf(a.Out, "  - %s\n", printer.Safe(line))
		}
	}
	if !f.yes {
		return errors.New("nothing was done: repeat it with --yes")
	}
	var failed []string
	for _, c := range all {
		fmt.Fprintf(a.Out, "\n%s:\n", printer.Safe(c.node))
		if err := a.clean(ctx, c); err != nil {
			fmt.Fprintln(a.Err, printer.Safe(fmt.Sprintf("%s: %v", c.node, err)))
			failed = append(failed, c.node)
		}
	}
	if len(failed) > 0 {
		return fmt.Errorf("the cleanup of %s failed; it may be repeated", strings.Join(failed, ", "))
	}
	return nil
}

func (a *app) clean(ctx context.Context, c cleaning) error {
	if c.stop != nil {
		if err := c.stop(ctx); err != nil {
			return fmt.Errorf("stop the agent: %w", err)
		}
	}
	return a.Start(ctx, c.path, c.args, a.Out, a.Err)
}

// steps are what weir-agent cleanup does, in words.
func steps(bpffs string) []string {
	return []string{
		"route to each pod, and to the pods of other nodes, by plain routes",
		"detach all of Weir's programs, and remove its maps (" + bpffs + ")",
		"remove Weir's links, and what the agent remembers of policies and services",
		"from then on: NO POLICY, no services, no masquerading, no flows, until an agent runs again",
	}
}

// cleanNode is for this machine as a node of a cluster.
func (a *app) cleanNode(place rundir.Place, f *cleanupFlags, further []string) ([]cleaning, error) {
	if len(f.nodes) > 0 {
		return nil, errors.New("--node is for labs: on a node of a cluster the cleanup is of that node alone")
	}
	path, err := a.Program("weir-agent")
	if err != nil {
		return nil, err
	}
	socket := filepath.Join(place.Dir, "agent.sock")
	if conn, err := net.DialTimeout("unix", socket, time.Second); err == nil {
		conn.Close()
		return nil, fmt.Errorf("an agent runs on %s: stop it first, and see to it that it is not started again", socket)
	}
	args := append([]string{"cleanup", "--socket", socket}, further...)
	node := "this machine"
	if host, err := os.Hostname(); err == nil {
		node = host
	}
	return []cleaning{{node: node, path: path, args: args, does: append([]string{"run " + path + " " + strings.Join(args, " ")}, steps("--bpffs, by default /sys/fs/bpf/weir")...)}}, nil
}

// cleanLab is for nodes of a lab: their namespaces are the lab's to enter.
func (a *app) cleanLab(place rundir.Place, f *cleanupFlags, further []string) ([]cleaning, error) {
	agents, err := a.agents(f.nodes)
	if err != nil {
		return nil, err
	}
	program, err := a.Program("weir-agent")
	if err != nil {
		return nil, err
	}
	lab, err := a.Program("weir-lab")
	if err != nil {
		return nil, err
	}
	var all []cleaning
	for _, s := range agents {
		state, bpffs := place.AgentFolders(s.Node)
		args := []string{"exec", "--name", place.Lab, "node/" + s.Node, "--", program, "cleanup", "--socket", s.Path, "--state-dir", state, "--bpffs", bpffs, "--uplink", "eth0"}
		all = append(all, cleaning{
			node: s.Node, path: lab, args: append(args, further...),
			stop: func(ctx context.Context) error { return a.stopAgent(ctx, place, s.Node) },
			does: append([]string{fmt.Sprintf("stop the agent (start it again with `weir lab part start --name %s agent/%s`)", place.Lab, s.Node)}, steps(bpffs)...),
		})
	}
	return all, nil
}

// stopAgent asks the lab to end an agent and to keep it down; one that is down stays so.
func (a *app) stopAgent(ctx context.Context, place rundir.Place, node string) error {
	s := place.Central("lab")
	conn, err := s.Dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := labv1.NewLabServiceClient(conn).ControlPart(ctx, &labv1.ControlPartRequest{Part: "agent/" + node, Action: labv1.ControlPartRequest_ACTION_STOP}); err != nil {
		return explainSocket(s, err)
	}
	return nil
}
