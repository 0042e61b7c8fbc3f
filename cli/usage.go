// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// flagGroup is the annotation that puts a flag under a heading of its own.
const flagGroup = "weir_group"

// addGroup adds a set of flags to a command, under a heading in its help.
func addGroup(cmd *cobra.Command, heading string, fs *pflag.FlagSet) {
	fs.VisitAll(func(f *pflag.Flag) {
		if f.Annotations == nil {
			f.Annotations = map[string][]string{}
		}
		f.Annotations[flagGroup] = []string{heading}
	})
	fs.SortFlags = false
	cmd.Flags().SortFlags = false
	cmd.Flags().AddFlagSet(fs)
}

// setUsage prints flags by their headings: of the command first, those of all commands last.
func setUsage(root *cobra.Command) {
	root.SetUsageFunc(func(cmd *cobra.Command) error {
		var b strings.Builder
		b.WriteString("Usage:\n")
		if cmd.Runnable() && !cmd.HasAvailableSubCommands() || cmd.HasAvailableLocalFlags() && cmd.Runnable() {
			b.WriteString("  " + cmd.UseLine() + "\n")
		}
		if cmd.HasAvailableSubCommands() {
			b.WriteString("  " + cmd.CommandPath() + " [command]\n")
		}
		if cmd.HasExample() {
			b.WriteString("\nExamples:\n" + cmd.Example + "\n")
		}
		if cmd.HasAvailableSubCommands() {
			b.WriteString("\nCommands:\n")
			width := 0
			for _, c := range cmd.Commands() {
				width = max(width, len(c.Name()))
			}
			for _, c := range cmd.Commands() {
				if c.IsAvailableCommand() || c.Name() == "help" {
					fmt.Fprintf(&b, "  %-*s   %s\n", width, c.Name(), c.Short)
				}
			}
		}
		for _, s := range sections(cmd) {
			b.WriteString("\n" + s.heading + ":\n" + s.flags.FlagUsages())
		}
		if cmd.HasAvailableSubCommands() {
			fmt.Fprintf(&b, "\nMore about a command: %s [command] --help\n", cmd.CommandPath())
		}
		fmt.Fprint(cmd.OutOrStdout(), b.String())
		return nil
	})
}

type section struct {
	heading string
	flags   *pflag.FlagSet
}

func sections(cmd *cobra.Command) []section {
	var out []section
	add := func(heading string, f *pflag.Flag) {
		for _, s := range out {
			if s.heading == heading {
				s.flags.AddFlag(f)
				return
			}
		}
		fs := pflag.NewFlagSet(heading, pflag.ContinueOnError)
		fs.SortFlags = false
		fs.AddFlag(f)
		out = append(out, section{heading, fs})
	}
	local := cmd.LocalNonPersistentFlags()
	local.SortFlags = false
	local.VisitAll(func(f *pflag.Flag) {
		heading := "Flags"
		if g := f.Annotations[flagGroup]; len(g) > 0 {
			heading = g[0]
		}
		add(heading, f)
	})
	global := cmd.Root().PersistentFlags()
	global.SortFlags = false
	global.VisitAll(func(f *pflag.Flag) {
		if own := cmd.LocalNonPersistentFlags().Lookup(f.Name); own == nil {
			add("Global flags", f)
		}
	})
	return out
}
