// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/weirmesh/weir/cli/internal/printer"
	"github.com/weirmesh/weir/cli/internal/rundir"
	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
)

// maxPause is what agents accept.
const maxPause = 24 * time.Hour

func (a *app) policyPauseCommand() *cobra.Command {
	var length time.Duration
	var reason string
	cmd := &cobra.Command{
		Use: "pause POD|node/NAME --for DURATION", Short: "Let through what policy would drop, for a while", Args: oneArgument("a pod or node/NAME"),
		Long: `Let through what policy would drop, for one pod or for a whole node, until a deadline: an emergency exit. What passes for this
reason alone is told as AUDIT in flows. A pause is logged, told as an event, survives a restart of the agent, and stands in
` + "`weir status`" + `. A new pause of the same pod or node takes the place of the old one.`,
		Example: `  weir policy pause shop/backend --for 5m --reason "INC-123"
  weir policy pause node/node1 --for 10m
  weir observe -f --verdict AUDIT`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if length < time.Second || length > maxPause {
				return fmt.Errorf("--for %s: a pause takes 1s to %s", length, maxPause)
			}
			return a.pause(cmd.Context(), args[0], length, reason)
		},
	}
	cmd.Flags().DurationVar(&length, "for", 0, "How long, such as 5m; at most 24h (required)")
	cmd.Flags().StringVar(&reason, "reason", "", "Why, for the log")
	withoutVariable(cmd, "for")
	withoutVariable(cmd, "reason")
	return cmd
}

func (a *app) policyResumeCommand() *cobra.Command {
	return &cobra.Command{
		Use: "resume POD|node/NAME", Short: "End a pause before its time", Args: oneArgument("a pod or node/NAME"),
		Example: `  weir policy resume shop/backend
  weir policy resume node/node1`,
		RunE: func(cmd *cobra.Command, args []string) error { return a.resume(cmd.Context(), args[0]) },
	}
}

// pausable is what a pause is of: a pod (empty = the whole node) and the agent that has it.
type pausable struct {
	pod    string
	node   string
	socket rundir.Socket
}

// words name it in a sentence, arg on a command line.
func (p pausable) words() string {
	if p.pod == "" {
		return "node " + p.node
	}
	return "pod " + p.pod + " on " + p.node
}

func (p pausable) arg() string {
	if p.pod == "" {
		return "node/" + p.node
	}
	return p.pod
}

func (a *app) findPausable(ctx context.Context, text string) (pausable, error) {
	place, err := rundir.Find(a.runDir, a.lab)
	if err != nil {
		return pausable{}, err
	}
	var p pausable
	name, isNode := strings.CutPrefix(text, "node/")
	if !isNode {
		name, isNode = strings.CutPrefix(text, "node:")
	}
	if isNode {
		p.node = name
	} else {
		if p.pod, p.node, err = a.podOf(ctx, end(text)); err != nil {
			return p, err
		}
		if p.node == "" {
			return p, fmt.Errorf("there is no pod %s", end(text))
		}
	}
	p.socket, err = agentOf(place, p.node)
	return p, err
}

// onAgent calls the agent of a pausable.
func onAgent[T any](ctx context.Context, a *app, p pausable, call func(context.Context, agentv1.AgentServiceClient) (T, error)) (T, error) {
	var none T
	ctx, cancel := context.WithTimeout(ctx, a.server.RequestTimeout)
	defer cancel()
	answers, err := askOne(ctx, p.socket, func(ctx context.Context, c agentv1.AgentServiceClient) ([]T, error) {
		answer, err := call(ctx, c)
		return []T{answer}, err
	})
	if err != nil {
		return none, err
	}
	return answers[0], nil
}

func (a *app) pause(ctx context.Context, text string, length time.Duration, reason string) error {
	p, err := a.findPausable(ctx, text)
	if err != nil {
		return err
	}
	r, err := onAgent(ctx, a, p, func(ctx context.Context, c agentv1.AgentServiceClient) (*agentv1.PausePolicyResponse, error) {
		return c.PausePolicy(ctx, &agentv1.PausePolicyRequest{Pod: p.pod, Seconds: uint32(length.Round(time.Second).Seconds()), Reason: reason})
	})
	if err != nil {
		return err
	}
	if r.GetUntil() == nil {
		return errors.New("the agent does not say until when it paused")
	}
	_, err = fmt.Fprintf(a.Out, "Policy of %s is paused until %s: what it would drop passes, and is told as AUDIT.\nEnd it before with `weir policy resume %s`.\n",
		printer.Safe(p.words()), r.GetUntil().AsTime().UTC().Format("15:04:05 UTC"), printer.Safe(p.arg()))
	return err
}

func (a *app) resume(ctx context.Context, text string) error {
	p, err := a.findPausable(ctx, text)
	if err != nil {
		return err
	}
	r, err := onAgent(ctx, a, p, func(ctx context.Context, c agentv1.AgentServiceClient) (*agentv1.ResumePolicyResponse, error) {
		return c.ResumePolicy(ctx, &agentv1.ResumePolicyRequest{Pod: p.pod})
	})
	if err != nil {
		return err
	}
	state := "is in force again"
	if !r.GetResumed() {
		state = "was not paused"
	}
	_, err = fmt.Fprintf(a.Out, "Policy of %s %s.\n", printer.Safe(p.words()), state)
	return err
}
