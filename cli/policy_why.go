// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/status"

	"github.com/weirmesh/weir/cli/internal/listing"
	"github.com/weirmesh/weir/cli/internal/plainjson"
	"github.com/weirmesh/weir/cli/internal/policytext"
	"github.com/weirmesh/weir/cli/internal/rundir"
	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
)

// exitDenied is the exit code of a connection that policy denies.
const exitDenied = 2

// What is on its way to the kernel is no disagreement: it is looked again.
const (
	whyTries    = 3
	whyInterval = 300 * time.Millisecond
)

func (a *app) policyWhyCommand() *cobra.Command {
	var output string
	var asked question
	cmd := &cobra.Command{
		Use: "why SRC DST PORT[/PROTO]", Short: "Say why a connection passes or not, step by step, on both sides",
		Long: `Say why a connection passes or not, step by step, on both sides: which endpoint, which identities, every rule that was looked at,
which won, and why the others lost or missed; and that the kernel of each node has the same.

SRC and DST are NAMESPACE/POD, POD in the namespace default (the name of a Deployment with one pod does as well), an address, node:NAME,
and for DST svc:NAMESPACE/NAME, or name:NAME for what DNS gave that name outside of the cluster. PROTO is tcp (default), udp, sctp, icmp or icmpv6; for the last two PORT is the type (icmp alone is an echo request).

Where policy has requests read by a proxy, the flags --http-..., --dns and --sni say what is asked on the connection: then the answer says which
item accepts it, or that none does.

The exit code is 0 if the connection (and what is asked on it) passes, 2 if it does not, and 1 if the answer is not sure: a kernel has something else, or could not be asked.`,
		Example: `  weir policy why shop/web shop/backend 8080
  weir policy why shop/web svc:kube-system/kube-dns 53/udp
  weir policy why 192.0.2.7 shop/web 443 -o json | jq '.sides[].rules[] | select(.nearest)'
  weir policy why node:node1 shop/web icmp
  weir policy why shop/web shop/backend 8080 --http-method POST --http-path /orders --http-header 'Content-Type: application/json'
  weir policy why shop/web svc:kube-system/kube-dns 53/udp --dns api.example.com
  weir policy why shop/web name:api.example.com 443 --sni api.example.com`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 3 {
				return fmt.Errorf("%s takes three arguments, SRC DST PORT[/PROTO], got %d: see `%s --help`", cmd.CommandPath(), len(args), cmd.CommandPath())
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := oneOf(output, "text", "json"); err != nil {
				return err
			}
			port, protocol, err := parsePort(args[2])
			if err != nil {
				return err
			}
			if strings.EqualFold(args[2], "icmp") && (isIPv6(args[0]) || isIPv6(args[1])) {
				port, protocol, _ = parsePort("icmpv6")
			}
			r := &policyv1.ExplainConnectionRequest{Source: end(args[0]), Destination: end(args[1]), Port: port, Protocol: protocol}
			if err := asked.put(r); err != nil {
				return err
			}
			return a.why(cmd.Context(), r, output)
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "text", "Output format: text, json")
	asked.add(cmd)
	complete(cmd, map[string][]string{"output": {"text", "json"}})
	return cmd
}

// question is what is asked on a connection.
type question struct {
	method, path, host string
	headers            []string
	dns, sni           string
}

func (q *question) add(cmd *cobra.Command) {
	set := cmd.Flags()
	set.StringVar(&q.method, "http-method", "", "Ask for an HTTP request with this `METHOD` (GET, if only another --http flag is given)")
	set.StringVar(&q.path, "http-path", "", "Ask for an HTTP request to this `PATH`, with its query")
	set.StringVar(&q.host, "http-host", "", "Ask for an HTTP request with this `HOST`")
	set.StringArrayVar(&q.headers, "http-header", nil, "Ask for an HTTP request with this `\"NAME: VALUE\"`; may be given again")
	set.StringVar(&q.dns, "dns", "", "Ask for a DNS query for this `NAME`")
	set.StringVar(&q.sni, "sni", "", "Ask for TLS with this server `NAME`")
}

// put asks in a request.
func (q *question) put(r *policyv1.ExplainConnectionRequest) error {
	r.Dns, r.Sni = q.dns, q.sni
	http := q.method != "" || q.path != "" || q.host != "" || len(q.headers) > 0
	switch {
	case q.dns != "" && q.sni != "", http && (q.dns != "" || q.sni != ""):
		return errors.New("one question at a time: --http-..., --dns or --sni")
	case !http:
		return nil
	}
	r.Http = &policyv1.HTTPRequest{Method: q.method, Path: q.path, Host: q.host}
	for _, h := range q.headers {
		name, value, ok := strings.Cut(h, ":")
		if name = strings.TrimSpace(name); !ok || name == "" {
			return fmt.Errorf(`invalid header %q: expected "NAME: VALUE"`, h)
		}
		r.Http.Headers = append(r.Http.Headers, &policyv1.HTTPHeader{Name: name, Value: strings.TrimSpace(value)})
	}
	return nil
}

// parsePort reads PORT[/PROTO]; a bare icmp is an echo request.
func parsePort(text string) (uint32, string, error) {
	number, protocol, given := strings.Cut(text, "/")
	if !given {
		protocol = "tcp"
		switch strings.ToLower(text) {
		case "icmp":
			return 8, "ICMP", nil
		case "icmpv6":
			return 128, "ICMPv6", nil
		}
	}
	protocol = map[string]string{"tcp": "TCP", "udp": "UDP", "sctp": "SCTP", "icmp": "ICMP", "icmpv4": "ICMP", "icmpv6": "ICMPv6"}[strings.ToLower(protocol)]
	if protocol == "" {
		return 0, "", fmt.Errorf("invalid port %q: the protocol is tcp, udp, sctp, icmp or icmpv6", text)
	}
	bits := 16
	if strings.HasPrefix(protocol, "ICMP") {
		bits = 8
	}
	n, err := strconv.ParseUint(number, 10, bits)
	if err != nil {
		return 0, "", fmt.Errorf("invalid port %q: expected a number up to %d, as in 8080 or 53/udp", text, 1<<bits-1)
	}
	return uint32(n), protocol, nil
}

func isIPv6(text string) bool {
	addr, err := netip.ParseAddr(text)
	return err == nil && addr.Unmap().Is6()
}

func (a *app) why(ctx context.Context, r *policyv1.ExplainConnectionRequest, output string) error {
	var e *policytext.Explanation
	var err error
	for try := range whyTries {
		if try > 0 {
			select {
			case <-ctx.Done():
				return errors.New("interrupted")
			case <-time.After(whyInterval):
			}
		}
		if e, err = a.explain(ctx, r); err != nil {
			return err
		}
		if !disagrees(e) {
			break
		}
	}
	if disagrees(e) {
		e.Lagging = a.laggingNow(ctx)
	}
	if output == "json" {
		err = a.explanationJSON(e)
	} else {
		e.Write(a.Out)
	}
	if err != nil {
		return err
	}
	if doubts := e.Doubts(); len(doubts) > 0 {
		return fmt.Errorf("not sure: %s", strings.Join(doubts, "; "))
	}
	if !e.Passes() {
		return &exit{code: exitDenied}
	}
	return nil
}

func disagrees(e *policytext.Explanation) bool {
	for i, s := range e.Answer.GetSides() {
		if len(e.Kernels[i].Differences(s)) > 0 {
			return true
		}
	}
	return false
}

// explain asks the policy service, and the agents of both ends what their kernels have.
func (a *app) explain(ctx context.Context, r *policyv1.ExplainConnectionRequest) (*policytext.Explanation, error) {
	get := func() (*policyv1.ExplainConnectionResponse, error) {
		return askPolicy(ctx, a, func(ctx context.Context, c policyv1.PolicyQueryServiceClient) (*policyv1.ExplainConnectionResponse, error) {
			return c.ExplainConnection(ctx, r)
		})
	}
	answer, err := get()
	// Each end may be the name of a Deployment; the answer names the first that is nobody.
	for _, field := range []struct {
		name string
		text *string
	}{{"source", &r.Source}, {"destination", &r.Destination}} {
		if !isNotFound(err) || !strings.HasPrefix(err.Error(), field.name+": ") {
			continue
		}
		found, resolveErr := a.resolveEnd(ctx, *field.text)
		if resolveErr != nil {
			return nil, resolveErr
		}
		if found == *field.text {
			break
		}
		*field.text = found
		answer, err = get()
	}
	if err != nil {
		return nil, err
	}
	e := &policytext.Explanation{
		Source: r.GetSource(), Destination: r.GetDestination(), Port: r.GetPort(), Protocol: r.GetProtocol(), Answer: answer,
		Kernels: make([]policytext.Kernel, len(answer.GetSides())),
	}
	place, err := rundir.Find(a.runDir, a.lab)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, a.server.RequestTimeout)
	defer cancel()
	for i, s := range answer.GetSides() {
		e.Kernels[i] = a.askKernel(ctx, place, s, a.peerAddress(ctx, place, r, answer, s))
	}
	return e, nil
}

// askKernel asks the agent of a side's node what its kernel decides, for the peer by its name, and by its address if that is known.
func (a *app) askKernel(ctx context.Context, place rundir.Place, s *policyv1.Side, address string) policytext.Kernel {
	if strings.HasPrefix(s.GetDestination(), policytext.NamePrefix) {
		return policytext.Kernel{Skipped: "it knows addresses; which of them have the name is seen only when it is looked up"}
	}
	socket, err := agentOf(place, s.GetNode())
	if err != nil {
		return policytext.Kernel{Fault: err.Error()}
	}
	conn, err := socket.Dial()
	if err != nil {
		return policytext.Kernel{Fault: err.Error()}
	}
	defer conn.Close()
	client := agentv1.NewAgentServiceClient(conn)
	request := &agentv1.LookupPolicyRequest{Endpoint: localName(s), Direction: s.GetDirection(), Peer: s.GetPeerKey(), Protocol: s.GetProtocol(), Port: s.GetPort()}
	entry, err := client.LookupPolicy(ctx, request)
	if err != nil {
		return policytext.Kernel{Fault: explainSocket(socket, err).Error()}
	}
	k := policytext.Kernel{Entry: entry}
	if address == "" {
		return k
	}
	request.Peer = address
	if at, err := client.LookupPolicy(ctx, request); err == nil {
		k.Address, k.AtAddress = address, at
	} else {
		a.log().Debug("the peer was not looked up by its address", "address", address, "error", status.Convert(err).Message())
	}
	return k
}

// agentOf returns the agent of a node; on a node of a cluster only its own is here.
func agentOf(place rundir.Place, node string) (rundir.Socket, error) {
	for _, s := range place.Agents() {
		if nodeName(s) == node {
			return s, nil
		}
	}
	return rundir.Socket{}, fmt.Errorf("the agent of node %s is not on this machine", node)
}

// Identities of ends that are no pods.
const (
	hostIdentity   = 1
	healthIdentity = 4
)

// localName is what the agent calls the endpoint of a side.
func localName(s *policyv1.Side) string {
	switch s.GetIdentity() {
	case hostIdentity:
		return "host"
	case healthIdentity:
		return "health"
	}
	return s.GetEndpoint()
}

// peerAddress is the address that the other end of a side has; empty = it is not known here.
func (a *app) peerAddress(ctx context.Context, place rundir.Place, r *policyv1.ExplainConnectionRequest, answer *policyv1.ExplainConnectionResponse, s *policyv1.Side) string {
	if s.GetDirection() == policyv1.Direction_DIRECTION_EGRESS {
		return s.GetDestination()
	}
	if _, err := netip.ParseAddr(r.GetSource()); err == nil {
		return r.GetSource()
	}
	family, err := netip.ParseAddr(s.GetDestination())
	if err != nil {
		return ""
	}
	for _, o := range answer.GetSides() {
		if o.GetDirection() != policyv1.Direction_DIRECTION_EGRESS {
			continue
		}
		socket, err := agentOf(place, o.GetNode())
		if err != nil {
			return ""
		}
		list, err := askOne(ctx, socket, func(ctx context.Context, c agentv1.AgentServiceClient) ([]*agentv1.LocalEndpoint, error) {
			l, err := c.ListEndpoints(ctx, &agentv1.ListEndpointsRequest{})
			return l.GetEndpoints(), err
		})
		if err != nil {
			return ""
		}
		for _, e := range list {
			if podName(e) != o.GetEndpoint() {
				continue
			}
			for _, text := range e.GetAddresses() {
				if addr, err := netip.ParseAddr(text); err == nil && addr.Is4() == family.Is4() {
					return text
				}
			}
		}
	}
	return ""
}

// laggingNow says which policies are not in force yet, where: what may explain that a kernel has something else.
func (a *app) laggingNow(ctx context.Context) []string {
	list, err := a.listPolicies(ctx, "", "", "")
	if err != nil {
		return nil
	}
	var out []string
	for _, p := range list {
		if len(p.GetLagging()) > 0 {
			out = append(out, policytext.Object(p.GetKind(), p.GetNamespace(), p.GetName())+" on "+policytext.Laggards(p))
		}
	}
	return out
}

// explanationJSON writes {"source", ..., "passes", "sure", "sides": [{..., "kernel": {...}}]}.
func (a *app) explanationJSON(e *policytext.Explanation) error {
	b := plainjson.AppendString([]byte(`{"source":`), e.Source)
	b = plainjson.AppendString(append(b, `,"destination":`...), e.Destination)
	b = plainjson.AppendString(fmt.Appendf(b, `,"port":%d,"protocol":`, e.Port), e.Protocol)
	b = plainjson.AppendString(append(b, `,"verdict":`...), e.Answer.GetVerdict().String())
	b = fmt.Appendf(b, `,"refused":%t,"passes":%t,"sure":%t,`, e.Answer.GetRefused(), e.Passes(), len(e.Doubts()) == 0)
	if r := e.Answer.GetRoute(); r != nil {
		var err error
		if b, err = plainjson.Append(append(b, `"route":`...), r); err != nil {
			return err
		}
		b = append(b, ',')
	}
	b = append(b, `"sides":[`...)
	for i, s := range e.Answer.GetSides() {
		if i > 0 {
			b = append(b, ',')
		}
		var err error
		if b, err = plainjson.Append(b, s); err != nil {
			return err
		}
		// The side's own closing brace comes after the kernel.
		b = append(b[:len(b)-1], `,"kernel":`...)
		if b, err = appendKernel(b, s, &e.Kernels[i]); err != nil {
			return err
		}
		b = append(b, '}')
	}
	return listing.Indent(a.Out, append(b, "]}"...))
}

func appendKernel(b []byte, s *policyv1.Side, k *policytext.Kernel) ([]byte, error) {
	if k.Skipped != "" {
		return append(plainjson.AppendString(append(b, `{"asked":false,"skipped":`...), k.Skipped), '}'), nil
	}
	if k.Entry == nil {
		return append(plainjson.AppendString(append(b, `{"asked":false,"fault":`...), k.Fault), '}'), nil
	}
	differences := k.Differences(s)
	b = fmt.Appendf(b, `{"asked":true,"agrees":%t,"differences":[`, len(differences) == 0)
	for i, d := range differences {
		if i > 0 {
			b = append(b, ',')
		}
		b = plainjson.AppendString(b, d)
	}
	b, err := plainjson.Append(append(b, `],"entry":`...), k.Entry)
	return append(b, '}'), err
}
