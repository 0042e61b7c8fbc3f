// SPDX-License-Identifier: Apache-2.0

package flowfilter

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/weirmesh/weir/gen/flow"
)

// matchClusterPatterns replaces cluster names that hold a `*` by a CEL
// expression: servers compare cluster names as text.
func matchClusterPatterns(f *flow.FlowFilter) {
	var conditions []string
	if c := clusterCondition("source", f.SourceClusterName); c != "" {
		conditions, f.SourceClusterName = append(conditions, c), nil
	}
	if c := clusterCondition("destination", f.DestinationClusterName); c != "" {
		conditions, f.DestinationClusterName = append(conditions, c), nil
	}
	if len(conditions) == 0 {
		return
	}
	// Expressions of one filter are alternatives, so that the user's own must be joined to the condition.
	if own := f.GetExperimental().GetCelExpression(); len(own) > 0 {
		conditions = append(conditions, "(("+strings.Join(own, ") || (")+"))")
	}
	f.Experimental = &flow.FlowFilter_Experimental{CelExpression: []string{strings.Join(conditions, " && ")}}
}

func clusterCondition(side string, names []string) string {
	if !slices.ContainsFunc(names, func(n string) bool { return strings.Contains(n, "*") }) {
		return ""
	}
	var patterns []string
	for _, name := range names {
		patterns = append(patterns, strings.ReplaceAll(regexp.QuoteMeta(name), `\*`, ".*"))
	}
	return fmt.Sprintf("_flow.%s.cluster_name.matches(%s)", side, strconv.Quote("^("+strings.Join(patterns, "|")+")$"))
}
