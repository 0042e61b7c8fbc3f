// SPDX-License-Identifier: Apache-2.0

package policytext

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"

	"github.com/weirmesh/weir/cli/internal/printer"
)

// InForce says where an object is in force: "generation 12 in force on 47/47 nodes".
func InForce(p *policyv1.PolicyObject) string {
	if p.GetEnforcedGeneration() == 0 {
		return "in force on no node"
	}
	return fmt.Sprintf("generation %d in force on %d/%d nodes", p.GetEnforcedGeneration(), p.GetEnforcingNodes(), p.GetNodes())
}

// Everywhere reports whether the object's last generation, and at least the given one, is in force on every node.
func Everywhere(p *policyv1.PolicyObject, generation int64) bool {
	return p.GetValid() && p.GetGeneration() >= generation && p.GetEnforcedGeneration() == p.GetGeneration() &&
		p.GetEnforcingNodes() == p.GetNodes() && len(p.GetLagging()) == 0
}

// Laggards names the nodes that are behind, and why.
func Laggards(p *policyv1.PolicyObject) string {
	words := make([]string, len(p.GetLagging()))
	for i, l := range p.GetLagging() {
		words[i] = l.GetNode()
		if l.GetReason() != "" {
			words[i] += " (" + l.GetReason() + ")"
		}
	}
	return strings.Join(words, ", ")
}

// Validity is yes, no, or not yet: valid, and more than Weir can enforce.
func Validity(p *policyv1.PolicyObject) string {
	switch {
	case p.GetValid():
		return "yes"
	case p.GetNotYet() != "":
		return "not yet"
	}
	return "no"
}

// Fault says why an object is not valid, and what that means; empty = it is valid.
func Fault(p *policyv1.PolicyObject) string {
	if p.GetValid() {
		return ""
	}
	text := "not valid: " + Bare(p.GetError(), Object(p.GetKind(), p.GetNamespace(), p.GetName()))
	if p.GetNotYet() != "" {
		text = "refused whole: Weir does not enforce " + p.GetNotYet() + " yet"
	}
	if p.GetEnforcedGeneration() != 0 {
		return fmt.Sprintf("%s; generation %d stays in force", text, p.GetEnforcedGeneration())
	}
	return text + "; nothing of it is in force"
}

// Bare cuts names that stand beside an error already off its beginning.
func Bare(text string, names ...string) string {
	for _, n := range names {
		if n != "" {
			text = strings.TrimPrefix(text, n+": ")
		}
	}
	return text
}

// Remarks are what a list must say of an object beside its row, a line each.
func Remarks(p *policyv1.PolicyObject) []string {
	name := Object(p.GetKind(), p.GetNamespace(), p.GetName())
	var out []string
	if f := Fault(p); f != "" {
		out = append(out, name+": "+f)
	}
	if len(p.GetLagging()) > 0 {
		out = append(out, fmt.Sprintf("%s: generation %d is not in force yet on %s", name, p.GetGeneration(), Laggards(p)))
	}
	for _, c := range p.GetConflicts() {
		out = append(out, name+": conflict: "+c)
	}
	if Routes(p) {
		for _, n := range p.GetNotes() {
			out = append(out, name+": "+n)
		}
	}
	return out
}

// Routes reports whether an object is an Envoy configuration, which routes services and selects no endpoints.
func Routes(p *policyv1.PolicyObject) bool {
	return p.GetKind() == "CiliumEnvoyConfig" || p.GetKind() == "CiliumClusterwideEnvoyConfig"
}

// Created reads when an object was made; zero = it does not say.
func Created(p *policyv1.PolicyObject) time.Time {
	var o struct {
		Metadata struct {
			CreationTimestamp string `json:"creationTimestamp"`
		} `json:"metadata"`
	}
	if json.Unmarshal(p.GetObject(), &o) != nil {
		return time.Time{}
	}
	t, err := time.Parse(time.RFC3339, o.Metadata.CreationTimestamp)
	if err != nil {
		return time.Time{}
	}
	return t
}

// Age is how long ago something was, shortly: 45s, 12m, 3h, 9d; "-" when it is not known.
func Age(now, t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	switch d := max(now.Sub(t), 0); {
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	default:
		return fmt.Sprintf("%dd", int(d.Hours())/24)
	}
}

// Status writes what becomes of an object.
func Status(w io.Writer, p *policyv1.PolicyObject, now time.Time) {
	line := func(name, format string, args ...any) {
		fmt.Fprintf(w, "%-12s %s\n", name+":", printer.Safe(fmt.Sprintf(format, args...)))
	}
	line("Policy", "%s", Object(p.GetKind(), p.GetNamespace(), p.GetName()))
	if created := Created(p); created.IsZero() {
		line("Generation", "%d", p.GetGeneration())
	} else {
		line("Generation", "%d, made %s ago", p.GetGeneration(), Age(now, created))
	}
	if f := Fault(p); f != "" {
		line("Valid", "NO: %s", f)
	} else {
		line("Valid", "yes")
	}
	line("In force", "%s", InForce(p))
	for _, l := range p.GetLagging() {
		line("Lagging", "node %s: %s", l.GetNode(), l.GetReason())
	}
	switch n := p.GetEndpoints(); {
	case Routes(p) && len(p.GetServices()) == 0:
		line("Routes", "no service")
	case Routes(p):
		line("Routes", "%s", strings.Join(p.GetServices(), ", "))
	case n == 0:
		line("Selects", "no endpoint: nothing is enforced by it")
	case n == 1:
		line("Selects", "1 endpoint")
	default:
		line("Selects", "%d endpoints", n)
	}
	if len(p.GetConflicts()) == 0 {
		line("Conflicts", "none")
	}
	for _, c := range p.GetConflicts() {
		if Routes(p) {
			line("Conflict", "%s", c)
			continue
		}
		line("Conflict", "%s; it keeps the policy that it had", c)
	}
	for _, n := range p.GetNotes() {
		line("Note", "%s", n)
	}
}
