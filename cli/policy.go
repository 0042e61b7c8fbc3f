// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/weirmesh/weir/cli/internal/policytext"
	"github.com/weirmesh/weir/cli/internal/rundir"
	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
)

const defaultNamespace = "default"

func (a *app) policyCommand() *cobra.Command {
	return group("policy", "See which policies there are, why a connection passes or not, and pause them",
		a.policyListCommand(), a.policyGetCommand(), a.policyValidateCommand(), a.policyWhyCommand(), a.policyEffectiveCommand(),
		a.policyWaitCommand(), a.policyPauseCommand(), a.policyResumeCommand())
}

// askPolicy calls the policy service: the first of its replicas on this machine that answers.
func askPolicy[T any](ctx context.Context, a *app, call func(context.Context, policyv1.PolicyQueryServiceClient) (T, error)) (T, error) {
	var none T
	place, err := rundir.Find(a.runDir, a.lab)
	if err != nil {
		return none, err
	}
	ctx, cancel := context.WithTimeout(ctx, a.server.RequestTimeout)
	defer cancel()
	var first error
	for _, s := range place.Replicas("policy") {
		conn, err := s.Dial()
		if err != nil {
			return none, err
		}
		answer, err := call(ctx, policyv1.NewPolicyQueryServiceClient(conn))
		conn.Close()
		if err == nil {
			return answer, nil
		}
		if code := status.Code(err); code != codes.Unavailable && !s.Missing {
			return none, explainPolicy(s, err)
		}
		if first == nil {
			first = explainPolicy(s, err)
		}
	}
	return none, first
}

// explainPolicy says why a question was not answered; what is wrong with the question itself needs no name of a part.
func explainPolicy(s rundir.Socket, err error) error {
	switch st := status.Convert(err); st.Code() {
	case codes.NotFound, codes.InvalidArgument, codes.FailedPrecondition:
		return &refusal{st.Message(), st.Code()}
	}
	return explainSocket(s, err)
}

// refusal is a question that makes no sense to a service, in its words.
type refusal struct {
	text string
	code codes.Code
}

func (r *refusal) Error() string { return r.text }

func isNotFound(err error) bool {
	var r *refusal
	return errors.As(err, &r) && r.code == codes.NotFound
}

// listPolicies asks for the objects of a namespace, a name and a kind; empty = all.
func (a *app) listPolicies(ctx context.Context, namespace, name, kind string) ([]*policyv1.PolicyObject, error) {
	return askPolicy(ctx, a, func(ctx context.Context, c policyv1.PolicyQueryServiceClient) ([]*policyv1.PolicyObject, error) {
		r, err := c.ListPolicies(ctx, &policyv1.ListPoliciesRequest{Namespace: namespace, Name: name, Kind: kind})
		return r.GetPolicies(), err
	})
}

// reference names a policy object as a person does.
type reference struct{ namespace, name, kind string }

// parseReference reads NAMESPACE/NAME, or NAME alone: of the whole cluster, or of any namespace if only one has it.
func parseReference(text, kind string) (reference, error) {
	namespace, name, ok := strings.Cut(text, "/")
	if !ok {
		return reference{name: text, kind: kind}, nil
	}
	if namespace == "" || name == "" || strings.Contains(name, "/") {
		return reference{}, fmt.Errorf("expected NAMESPACE/NAME or NAME, got %q", text)
	}
	return reference{namespace: namespace, name: name, kind: kind}, nil
}

func (r reference) String() string { return policytext.Object(r.kind, r.namespace, r.name) }

// findPolicy returns the one object that is meant; nil = there is none.
func (a *app) findPolicy(ctx context.Context, r reference) (*policyv1.PolicyObject, error) {
	found, err := a.listPolicies(ctx, r.namespace, r.name, r.kind)
	if err != nil {
		return nil, err
	}
	switch len(found) {
	case 0:
		return nil, nil
	case 1:
		return found[0], nil
	}
	var names []string
	for _, p := range found {
		names = append(names, policytext.Object(p.GetKind(), p.GetNamespace(), p.GetName()))
	}
	return nil, fmt.Errorf("several policies are called %s: %s; name one by NAMESPACE/NAME and --kind", r.name, strings.Join(names, ", "))
}

// oneArgument wants exactly one argument, and says what.
func oneArgument(what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != 1 {
			return fmt.Errorf("%s takes one argument, %s, got %d: see `%s --help`", cmd.CommandPath(), what, len(args), cmd.CommandPath())
		}
		return nil
	}
}

// oneOf checks an output format.
func oneOf(output string, formats ...string) error {
	if !slices.Contains(formats, output) {
		return fmt.Errorf("unknown output format: %s, expected %s", output, strings.Join(formats, ", "))
	}
	return nil
}

// end completes the name of one end of a connection: "pod" is default/pod.
func end(text string) string {
	if strings.Contains(text, "/") || strings.HasPrefix(text, "node:") || strings.HasPrefix(text, policytext.NamePrefix) {
		return text
	}
	if rest, ok := strings.CutPrefix(text, "svc:"); ok {
		return "svc:" + defaultNamespace + "/" + rest
	}
	if _, err := netip.ParseAddr(text); err == nil {
		return text
	}
	return defaultNamespace + "/" + text
}

// generatedSuffix is what a Deployment's and its ReplicaSet's pods have behind its name.
var generatedSuffix = regexp.MustCompile(`^-[a-z0-9]+-[a-z0-9]{5}$`)

// podOf returns the pod that a name means: itself, or the only pod of a Deployment of that name, and its node. Not found is an empty node.
func (a *app) podOf(ctx context.Context, name string) (pod, node string, err error) {
	f := &nodeFlags{output: "table"}
	list, err := ask(ctx, a, f, func(ctx context.Context, c agentv1.AgentServiceClient) ([]*agentv1.LocalEndpoint, error) {
		r, err := c.ListEndpoints(ctx, &agentv1.ListEndpointsRequest{})
		return r.GetEndpoints(), err
	})
	var near []fromNode[*agentv1.LocalEndpoint]
	for _, e := range list {
		full := podName(e.value)
		if full == name {
			return full, e.node, nil
		}
		if rest, ok := strings.CutPrefix(full, name); ok && generatedSuffix.MatchString(rest) {
			near = append(near, e)
		}
	}
	switch {
	case len(near) == 1:
		return podName(near[0].value), near[0].node, nil
	case len(near) > 1:
		var names []string
		for _, e := range near {
			names = append(names, podName(e.value))
		}
		return "", "", fmt.Errorf("%s has several pods, name one of %s", name, strings.Join(names, ", "))
	case err != nil:
		return "", "", fmt.Errorf("pod %s is on no node that answers: %w", name, err)
	}
	return "", "", nil
}

// resolveEnd returns the pod that an end means if it is no pod's own name; else the end itself.
func (a *app) resolveEnd(ctx context.Context, text string) (string, error) {
	if _, err := netip.ParseAddr(text); err == nil || strings.Contains(text, ":") {
		return text, nil
	}
	pod, _, err := a.podOf(ctx, text)
	if err != nil || pod == "" {
		return text, err
	}
	return pod, nil
}
