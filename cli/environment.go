// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// excluding are flags of which a variable must not set one when the command
// line has another: what is typed wins over what is exported.
var excluding = [][]string{
	{"first", "last", "all"},
	{"first", "follow"},
	{"numeric", "ip-translation"},
}

// noVariable are the flags that make no sense as a standing setting.
var noVariable = []string{"help", "not", "no-descriptions"}

// ownMeaning is the annotation of a flag that means something else in one command than its variable does in all.
const ownMeaning = "weir_own_meaning"

func withoutVariable(cmd *cobra.Command, name string) {
	f := cmd.Flags().Lookup(name)
	if f.Annotations == nil {
		f.Annotations = map[string][]string{}
	}
	f.Annotations[ownMeaning] = []string{"true"}
}

// applyEnvironment sets each flag that the command line left alone from WEIR_<FLAG>. An empty variable counts as none.
func applyEnvironment(flags *pflag.FlagSet, lookup func(string) (string, bool)) error {
	given := map[string]bool{}
	flags.Visit(func(f *pflag.Flag) { given[f.Name] = true })
	var faults []error
	flags.VisitAll(func(f *pflag.Flag) {
		if given[f.Name] || f.Annotations[ownMeaning] != nil || slices.Contains(noVariable, f.Name) || excluded(f.Name, given) {
			return
		}
		name := variable(f.Name)
		value, ok := lookup(name)
		if !ok || value == "" {
			return
		}
		if err := flags.Set(f.Name, value); err != nil {
			faults = append(faults, fmt.Errorf("variable %s: %w", name, err))
		}
	})
	return errors.Join(faults...)
}

func variable(flag string) string {
	return "WEIR_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

func excluded(name string, given map[string]bool) bool {
	for _, group := range excluding {
		if slices.Contains(group, name) && slices.ContainsFunc(group, func(other string) bool { return given[other] }) {
			return true
		}
	}
	return false
}
