// SPDX-License-Identifier: Apache-2.0

package policytext

import (
	"bytes"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"text/tabwriter"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"

	"github.com/weirmesh/weir/cli/internal/printer"
)

// Explanation is what happens to a connection, and why.
type Explanation struct {
	Source, Destination string
	// Port and protocol as asked for: of the service, if Destination is one.
	Port     uint32
	Protocol string
	Answer   *policyv1.ExplainConnectionResponse
	// Kernels has an entry for each side of the answer.
	Kernels []Kernel
	// Lagging says what is not in force yet where the kernel has something else.
	Lagging []string
}

// Passes reports whether the connection passes, and what is asked on it.
func (e *Explanation) Passes() bool { return e.connects() && !e.Answer.GetRefused() }

// connects reports whether the connection passes.
func (e *Explanation) connects() bool {
	if len(e.Answer.GetSides()) == 0 {
		return e.Answer.GetVerdict() == policyv1.Verdict_VERDICT_ALLOW
	}
	for i, s := range e.Answer.GetSides() {
		if !e.Kernels[i].Passes(s) {
			return false
		}
	}
	return true
}

// Doubts says where the kernel disagrees or could not be asked; empty = the answer is sure.
func (e *Explanation) Doubts() []string {
	var out []string
	for i, s := range e.Answer.GetSides() {
		k := &e.Kernels[i]
		if text := fmt.Sprintf("the kernel of %s was not asked: %s", s.GetNode(), k.Fault); k.Entry == nil && k.Skipped == "" && !slices.Contains(out, text) {
			out = append(out, text)
		}
		if d := k.Differences(s); len(d) > 0 {
			out = append(out, fmt.Sprintf("the kernel of %s DISAGREES on the %s of %s: %s", s.GetNode(), Direction(s.GetDirection()), s.GetEndpoint(), strings.Join(d, "; ")))
		}
	}
	return out
}

// Outcome is the verdict in a word.
func (e *Explanation) Outcome() string {
	switch {
	case !e.connects():
		return "DENIED"
	case e.Answer.GetRefused():
		return "the connection is ALLOWED, what is asked on it is REFUSED"
	case e.Answer.GetVerdict() != policyv1.Verdict_VERDICT_ALLOW:
		return "ALLOWED by audit alone: policy denies it"
	}
	return "ALLOWED"
}

// Write tells all steps.
func (e *Explanation) Write(w io.Writer) {
	port := e.port()
	safely(w, "%s -> %s, %s: %s\n", e.Source, e.Destination, port, e.Outcome())
	if r := e.Answer.GetRoute(); r != nil {
		safely(w, "The connection goes to listener %s of %s first; what follows is about the service's own backends.\n", r.GetListener(),
			Object(r.GetKind(), r.GetNamespace(), r.GetName()))
	}
	if through := e.through(); through != "" {
		safely(w, "%s\n", through)
	}
	step := 0
	for _, d := range []policyv1.Direction{policyv1.Direction_DIRECTION_EGRESS, policyv1.Direction_DIRECTION_INGRESS} {
		step++
		fmt.Fprintln(w)
		found := false
		for i, s := range e.Answer.GetSides() {
			if s.GetDirection() == d {
				found = true
				writeSide(w, step, s, &e.Kernels[i])
			}
		}
		if !found {
			e.writeNone(w, step, d)
		}
	}
	if len(e.Lagging) > 0 {
		fmt.Fprintln(w)
		for _, l := range e.Lagging {
			safely(w, "Not in force yet: %s\n", l)
		}
	}
}

func (e *Explanation) port() string {
	if p := strings.ToUpper(e.Protocol); strings.HasPrefix(p, "ICMP") {
		return fmt.Sprintf("%s type %d", e.Protocol, e.Port)
	}
	return fmt.Sprintf("%d/%s", e.Port, e.Protocol)
}

// through says what a service's address was translated to.
func (e *Explanation) through() string {
	for _, s := range e.Answer.GetSides() {
		_, err := netip.ParseAddr(e.Destination)
		if strings.HasPrefix(e.Destination, NamePrefix) {
			return ""
		}
		if s.GetPort() == e.Port && !strings.HasPrefix(e.Destination, "svc:") && (err != nil || e.Destination == s.GetDestination()) {
			continue
		}
		backend := s.GetDestination()
		for _, o := range e.Answer.GetSides() {
			if o.GetDirection() == policyv1.Direction_DIRECTION_INGRESS {
				backend = o.GetEndpoint() + " (" + backend + ")"
			}
		}
		return fmt.Sprintf("The service leads to its backends; this is about %s, %s.", backend, Port(s.GetProtocol(), s.GetPort()))
	}
	return ""
}

// writeNone tells of an end without policy.
func (e *Explanation) writeNone(w io.Writer, step int, d policyv1.Direction) {
	end := e.Source
	if d == policyv1.Direction_DIRECTION_INGRESS {
		end = e.Destination
	}
	why := "no policy can select it: it is outside of the cluster, or the mesh leaves it alone"
	if len(e.Answer.GetSides()) == 0 && !strings.Contains(end, ":") && strings.Contains(end, "/") {
		why = "not checked: a pod that reaches itself always passes"
	}
	safely(w, "%d. %s of %s\n   %s\n", step, title(Direction(d)), end, why)
}

func title(s string) string { return strings.ToUpper(s[:1]) + s[1:] }

const labelWidth = 10

// item writes a named line of a side; text that is long goes on below its beginning.
func item(w io.Writer, name string, words ...string) {
	const limit = 110
	lines, width := []string{""}, 0
	for _, word := range words {
		word = printer.Safe(word)
		if width > 0 && width+1+len(word) > limit {
			lines, width = append(lines, ""), 0
		}
		if width > 0 {
			lines[len(lines)-1] += " "
			width++
		}
		lines[len(lines)-1] += word
		width += len(word)
	}
	for i, l := range lines {
		if i > 0 {
			name = ""
		}
		fmt.Fprintf(w, "   %-*s %s\n", labelWidth, name, l)
	}
}

func writeSide(w io.Writer, step int, s *policyv1.Side, k *Kernel) {
	safely(w, "%d. %s of %s, on %s\n", step, title(Direction(s.GetDirection())), s.GetEndpoint(), s.GetNode())
	item(w, "endpoint", append([]string{fmt.Sprintf("identity %d:", s.GetIdentity())}, Labels(s.GetLabels())...)...)
	item(w, "peer", append([]string{peerWords(s)}, Labels(s.GetPeerLabels())...)...)
	item(w, "port", Port(s.GetProtocol(), s.GetPort())+" at "+s.GetDestination())
	switch {
	case !s.GetEnforced() && len(s.GetRules()) == 0:
		item(w, "enforced", "no: no policy selects the endpoint in this direction, so everything passes")
	case !s.GetEnforced():
		item(w, "enforced", "no: no policy selects the endpoint in this direction; what its proxy-visibility annotation names is read")
	default:
		by := "by rules that switch no default deny on: what none of them denies passes"
		if len(s.GetEnforcedBy()) > 0 {
			by = "default deny, by " + strings.Join(s.GetEnforcedBy(), ", ")
		}
		item(w, "enforced", by)
		writeRules(w, s)
	}
	writeNames(w, s)
	item(w, "verdict", verdictWords(s, k))
	writeFilter(w, s)
	writeKernel(w, s, k)
}

// writeNames tells of rules by DNS name.
func writeNames(w io.Writer, s *policyv1.Side) {
	for i, n := range s.GetNames() {
		name := ""
		if i == 0 {
			name = "names"
		}
		text := "an address that DNS named so passes: " + n.GetSelector()
		if n.GetMatches() {
			text = "the name matches " + n.GetSelector()
		}
		item(w, name, text+", by "+Rules(n.GetRules()))
	}
}

// writeFilter tells what becomes of requests.
func writeFilter(w io.Writer, s *policyv1.Side) {
	f := s.GetFilter()
	switch {
	case f == nil:
		return
	case f.GetVisibility():
		item(w, "requests", "all pass; a proxy reads them, to be seen only (proxy-visibility)")
		return
	case s.GetRefused():
		item(w, "requests", "REFUSED: no item accepts what is asked")
	case s.GetAsked():
		item(w, "requests", "accepted")
	default:
		item(w, "requests", "pass where an item accepts them ("+f.GetKey()+")")
	}
	var b bytes.Buffer
	t := tabwriter.NewWriter(&b, 2, 0, 2, ' ', 0)
	for _, i := range s.GetItems() {
		mark := "item"
		switch {
		case i.GetAccepts():
			mark = "accepts"
		case s.GetAsked():
			mark = "no"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", mark, printer.Safe(i.GetItem()), printer.Safe(Rule(i.GetRule())), printer.Safe(i.GetReason()))
	}
	_ = t.Flush() // a buffer takes everything
	for line := range strings.Lines(b.String()) {
		fmt.Fprintf(w, "   %-*s %s\n", labelWidth, "", strings.TrimRight(line, " \n"))
	}
}

func peerWords(s *policyv1.Side) string {
	switch {
	case s.GetPeerIdentity() == 0:
		return s.GetPeerKey() + ":"
	case s.GetPeerKey() != "" && s.GetPeerKey() != fmt.Sprint(s.GetPeerIdentity()):
		return fmt.Sprintf("identity %d (%s):", s.GetPeerIdentity(), s.GetPeerKey())
	}
	return fmt.Sprintf("identity %d:", s.GetPeerIdentity())
}

func writeRules(w io.Writer, s *policyv1.Side) {
	if len(s.GetRules()) == 0 {
		item(w, "rules", "none")
		return
	}
	var b bytes.Buffer
	t := tabwriter.NewWriter(&b, 2, 0, 2, ' ', 0)
	for _, r := range s.GetRules() {
		fmt.Fprintf(t, "%s\t%s\t%s\n", mark(r), printer.Safe(Rule(r.GetRule())), printer.Safe(reason(r)))
	}
	_ = t.Flush() // a buffer takes everything
	for i, line := range strings.Split(strings.TrimRight(b.String(), "\n"), "\n") {
		name := ""
		if i == 0 {
			name = "rules"
		}
		fmt.Fprintf(w, "   %-*s %s\n", labelWidth, name, line)
	}
}

// mark is what became of a rule, in a word.
func mark(r *policyv1.RuleStep) string {
	switch {
	case r.GetDecided():
		return "won"
	case r.GetPeerMatches() && r.GetPortMatches() && strings.HasPrefix(r.GetReason(), "it passes"):
		return "passed"
	case r.GetPeerMatches() && r.GetPortMatches():
		return "lost"
	case r.GetNearest():
		return "nearest"
	}
	return "missed"
}

// shortKeys names the labels that Weir adds as a person would.
var shortKeys = strings.NewReplacer(
	nameOfNamespace, "namespace=", ofNamespaceLabel, "namespace label ", "k8s:io.kubernetes.pod.namespace", "namespace", "k8s:io.cilium.k8s.policy.", "",
)

func reason(r *policyv1.RuleStep) string {
	half := ""
	switch {
	case r.GetPeerMatches() && r.GetPortMatches():
		half = "peer and port match"
	case r.GetPeerMatches():
		half = "the peer matches"
	case r.GetPortMatches():
		half = "the port matches"
	case r.GetReason() == "":
		return "neither peer nor port matches"
	}
	text := shortKeys.Replace(r.GetReason())
	switch {
	case text == "":
		return half
	case half == "":
		return text
	}
	return half + "; " + text
}

func verdictWords(s *policyv1.Side, k *Kernel) string {
	text := Verdict(s.GetVerdict())
	switch s.GetVerdict() {
	case policyv1.Verdict_VERDICT_DEFAULT_DENY:
		text += ": no rule allows it"
		for _, r := range s.GetRules() {
			if r.GetNearest() {
				text += "; " + Rule(r.GetRule()) + " came nearest"
			}
		}
	default:
		if rules := Decided(s); len(rules) > 0 {
			text += ", by " + Rules(rules)
		}
	}
	if s.GetVerdict() != policyv1.Verdict_VERDICT_ALLOW && k.audit(s) {
		text += "; IT PASSES all the same, and is told as AUDIT"
	}
	return text
}

func writeKernel(w io.Writer, s *policyv1.Side, k *Kernel) {
	switch d := k.Differences(s); {
	case k.Skipped != "":
		item(w, "kernel", "not asked: "+k.Skipped)
	case k.Entry == nil:
		item(w, "kernel", "NOT ASKED: "+k.Fault)
	case len(d) > 0:
		item(w, "kernel", "DISAGREES: "+strings.Join(d, "; "))
		item(w, "", "it has: "+k.words())
	default:
		item(w, "kernel", "agrees: "+k.words())
	}
}

// safely prints with everything that came from outside made harmless.
func safely(w io.Writer, format string, args ...any) {
	for i, a := range args {
		if s, ok := a.(string); ok {
			args[i] = printer.Safe(s)
		}
	}
	fmt.Fprintf(w, format, args...)
}
