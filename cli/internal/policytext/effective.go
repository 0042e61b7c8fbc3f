// SPDX-License-Identifier: Apache-2.0

package policytext

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"

	"github.com/weirmesh/weir/cli/internal/listing"
)

// Effective writes who may reach an endpoint, and whom it may reach.
func Effective(w io.Writer, endpoint string, r *policyv1.GetEffectivePolicyResponse) error {
	for i, d := range r.GetDirections() {
		if i > 0 {
			fmt.Fprintln(w)
		}
		question := "Who may reach " + endpoint
		if d.GetDirection() == policyv1.Direction_DIRECTION_EGRESS {
			question = "What " + endpoint + " may reach"
		}
		safely(w, "%s (%s): ", question, Direction(d.GetDirection()))
		if !d.GetEnforced() && len(d.GetRows()) == 0 {
			fmt.Fprintln(w, "everything; no policy selects it in this direction")
			continue
		}
		by := "not in default deny"
		if len(d.GetEnforcedBy()) > 0 {
			by = "default deny, by " + strings.Join(d.GetEnforcedBy(), ", ")
		}
		if d.GetAudit() {
			by += "; what is denied passes, and is told as AUDIT"
		}
		safely(w, "%s\n", by)
		if err := writeRows(w, d.GetRows()); err != nil {
			return err
		}
	}
	return nil
}

// writeRows writes what is allowed first, then what rules deny, then the rest. That the remaining ports of somebody who may use some are
// denied goes without saying.
func writeRows(w io.Writer, rows []*policyv1.EffectiveRow) error {
	named := map[string]bool{}
	for _, r := range rows {
		if r.GetVerdict() != policyv1.Verdict_VERDICT_DEFAULT_DENY {
			named[r.GetPeers()] = true
		}
	}
	sorted := slices.DeleteFunc(slices.Clone(rows), func(r *policyv1.EffectiveRow) bool {
		return r.GetVerdict() == policyv1.Verdict_VERDICT_DEFAULT_DENY && named[r.GetPeers()] && rest(r) == 0
	})
	rank := func(v policyv1.Verdict) int {
		return slices.Index([]policyv1.Verdict{policyv1.Verdict_VERDICT_ALLOW, policyv1.Verdict_VERDICT_DENY, policyv1.Verdict_VERDICT_DEFAULT_DENY}, v)
	}
	slices.SortStableFunc(sorted, func(a, b *policyv1.EffectiveRow) int {
		return cmp.Or(cmp.Compare(rank(a.GetVerdict()), rank(b.GetVerdict())), cmp.Compare(rest(a), rest(b)))
	})
	filtered := slices.ContainsFunc(sorted, func(r *policyv1.EffectiveRow) bool { return requests(r) != "" })
	table := make([][]string, 0, len(sorted))
	for _, r := range sorted {
		table = append(table, []string{Verdict(r.GetVerdict()), r.GetPeers(), r.GetPorts(), cmp.Or(requests(r), "-"), cmp.Or(some(r.GetEndpoints()), "-"), cmp.Or(Rules(r.GetRules()), "-")})
	}
	var b bytes.Buffer
	titles := []string{"VERDICT", "PEERS", "PORTS", "REQUESTS", "NOW", "BY"}
	if !filtered { // few policies say something of requests
		const column = 3
		titles = slices.Delete(titles, column, column+1)
		for i := range table {
			table[i] = slices.Delete(table[i], column, column+1)
		}
	}
	if err := listing.Table(&b, titles, table); err != nil {
		return err
	}
	for line := range strings.Lines(b.String()) {
		if _, err := io.WriteString(w, "  "+line); err != nil {
			return fmt.Errorf("write output: %w", err)
		}
	}
	return nil
}

// requests says which of them pass; empty = all.
func requests(r *policyv1.EffectiveRow) string {
	if r.GetVisibility() {
		return "all, seen by a proxy"
	}
	return some(r.GetRequests())
}

// rest ranks the row for everybody else last.
func rest(r *policyv1.EffectiveRow) int {
	if r.GetPeers() == "any other peer" {
		return 1
	}
	return 0
}

// some names the first few endpoints and counts the others.
func some(names []string) string {
	const most = 4
	if len(names) <= most {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
}
