// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	"github.com/weirmesh/weir/cli/internal/flowfilter"
	"github.com/weirmesh/weir/cli/internal/flowmatch"
	"github.com/weirmesh/weir/cli/internal/flowsource"
	"github.com/weirmesh/weir/cli/internal/printer"
	"github.com/weirmesh/weir/cli/internal/selection"
	"github.com/weirmesh/weir/cli/internal/stage"
	"github.com/weirmesh/weir/cli/internal/timeval"
	"github.com/weirmesh/weir/gen/flow"
	"github.com/weirmesh/weir/gen/observer"
	observerv1 "github.com/weirmesh/weir/gen/weir/observer/v1"
)

// printedFields is all of a flow that compact, dict and table show.
var printedFields = []string{
	"time", "verdict", "auth_type", "ethernet", "IP", "l4", "source.identity", "source.namespace", "source.pod_name",
	"destination.identity", "destination.namespace", "destination.pod_name", "Type", "node_name", "source_names",
	"destination_names", "l7", "event_type", "source_service", "destination_service", "traffic_direction",
	"policy_match_type", "ip_trace_id", "is_reply", "debug_capture_point", "sock_xlate_point", "Summary", "extensions",
	"egress_allowed_by", "ingress_allowed_by", "egress_denied_by", "ingress_denied_by",
}

// errTableFollow: a table is aligned once all of it is known.
var errTableFollow = errors.New("table output format is not compatible with follow mode")

// observeFlags are the flags of `observe` and `observe flows`.
type observeFlags struct {
	selection selection.Flags
	format    formatFlags
	filters   flowfilter.Builder

	color         string
	numeric       bool
	ipTranslation bool
	stats         bool

	allowlist, denylist []string
	printRawFilters     bool

	inputFile       string
	silentErrors    bool
	fieldMask       []string
	useDefaultMasks bool
}

// formatFlags are the flags that flows and events share.
type formatFlags struct {
	output      string
	nodeName    bool
	policyNames bool
	timeFormat  string
	timeZone    string
}

func (f *formatFlags) register(fs *pflag.FlagSet) {
	var names []string
	for _, t := range timeval.Formats() {
		names = append(names, t.Name)
	}
	fs.StringVarP(&f.output, "output", "o", "compact", `Output format:
compact   one line a flow
dict      key: value
table     aligned columns, shown at the end
json      by proto's JSON mapping, one GetFlowsResponse a line (also: jsonpb)
flat      the bare flow for jq: numbers as numbers, drop reason in words`)
	fs.BoolVar(&f.nodeName, "print-node-name", false, "Show on which node a flow was seen")
	fs.BoolVar(&f.policyNames, "print-policy-names", false, "Show which policies allowed or denied a flow")
	fs.StringVar(&f.timeFormat, "time-format", "StampMilli", "Format of times, not in JSON: "+strings.Join(names, ", "))
	fs.StringVar(&f.timeZone, "time-zone", "UTC", "Zone of times, shown and given: UTC, Local or a name such as Europe/Berlin; not in JSON")
}

// options checks the flags and makes printer options of them.
func (f *formatFlags) options() (printer.Options, error) {
	format, err := printer.ParseFormat(f.output)
	if err != nil {
		return printer.Options{}, err
	}
	layout, ok := timeval.Layout(f.timeFormat)
	if !ok {
		return printer.Options{}, fmt.Errorf("invalid --time-format: %s", f.timeFormat)
	}
	zone, err := time.LoadLocation(f.timeZone)
	if err != nil {
		return printer.Options{}, fmt.Errorf("invalid --time-zone: %w", err)
	}
	return printer.Options{Format: format, Layout: layout, Location: zone, NodeName: f.nodeName, PolicyNames: f.policyNames}, nil
}

func registerSelection(fs *pflag.FlagSet, s *selection.Flags) {
	layouts := make([]string, 0, 9)
	for _, f := range timeval.Formats() {
		layouts = append(layouts, f.Layout)
	}
	fs.Uint64Var(&s.Last, "last", 0, fmt.Sprintf("The newest N flows (%d when nothing else selects)", selection.DefaultNumber))
	fs.Uint64Var(&s.First, "first", 0, "The oldest N flows")
	fs.BoolVar(&s.All, "all", false, "All flows in the observer's memory")
	fs.BoolVarP(&s.Follow, "follow", "f", false, "Flows as they happen; with --last the newest N first")
	fs.StringVar(&s.Since, "since", "", "Flows since a time: 30s, 5m, 2h30m, 1d ago, or absolute as in\n"+strings.Join(layouts, "\n"))
	fs.StringVar(&s.Until, "until", "", "Flows until a time, given as for --since")
}

func (a *app) observeCommand() *cobra.Command {
	build := func(use, short string) *cobra.Command {
		o := &observeFlags{}
		cmd := &cobra.Command{
			Use: use, Short: short, Args: noArgs,
			Long: short + `.

A flow is a packet that began, changed or ended a connection, a dropped packet, or a periodic report of a
live connection. Filters can be repeated: one filter given twice means either value, different ones must all hold.`,
			Example: `  weir observe -f                                         # everything, as it happens
  weir observe --type l7 -f                               # HTTP requests and DNS queries
  weir observe --namespace production --verdict DROPPED   # what was refused in a namespace
  weir observe --pod default/todoui --since 5m --last 10  # the newest ten flows of a pod in five minutes
  weir observe --not --to-port 53 --from-identity world   # from outside, DNS left out
  weir observe --namespace production --verdict DROPPED -o flat | \
    jq 'select(.drop_reason_desc == "Authentication required")'
  weir observe --namespace production --protocol http -o flat | \
    jq '.l7.latency_ns / 1000000'`,
			RunE: func(cmd *cobra.Command, _ []string) error { return a.observe(cmd.Context(), o) },
		}
		o.register(cmd)
		return cmd
	}
	cmd := build("observe", "Show flows")
	cmd.AddCommand(build("flows", "Show flows"), a.agentEventsCommand(), a.debugEventsCommand())
	return cmd
}

func (o *observeFlags) register(cmd *cobra.Command) {
	fs := pflag.NewFlagSet("", pflag.ContinueOnError)
	registerSelection(fs, &o.selection)
	addGroup(cmd, "Selectors", fs)

	fs = pflag.NewFlagSet("", pflag.ContinueOnError)
	o.filters.Register(fs)
	addGroup(cmd, "Filters", fs)

	fs = pflag.NewFlagSet("", pflag.ContinueOnError)
	fs.StringArrayVar(&o.allowlist, "allowlist", nil, "FlowFilters as JSON; flows that match one of them are shown")
	fs.StringArrayVar(&o.denylist, "denylist", nil, "FlowFilters as JSON; flows that match one of them are not shown")
	fs.BoolVar(&o.printRawFilters, "print-raw-filters", false, "Print what the filters mean as YAML, and nothing else")
	addGroup(cmd, "Raw filters", fs)

	fs = pflag.NewFlagSet("", pflag.ContinueOnError)
	o.format.register(fs)
	fs.StringVar(&o.color, "color", "auto", "Colours in compact and dict: auto, always, never; auto heeds NO_COLOR")
	fs.BoolVar(&o.ipTranslation, "ip-translation", true, "Show names in place of addresses")
	fs.BoolVar(&o.numeric, "numeric", false, "Show addresses: the same as --ip-translation=false")
	fs.BoolVar(&o.stats, "print-stats", false, "Show packets/bytes there (>) and back (<) and round trips of the connection so far")
	addGroup(cmd, "Format", fs)

	fs = pflag.NewFlagSet("", pflag.ContinueOnError)
	fs.StringVar(&o.inputFile, "input-file", "", "Read flows from a file that -o json wrote, or from - for standard input")
	fs.BoolVarP(&o.silentErrors, "silent-errors", "s", false, "Do not tell about nodes that are unavailable")
	fs.StringSliceVar(&o.fieldMask, "field-mask", nil, "Fields to ask for, such as time,source.pod_name; JSON formats only")
	fs.BoolVar(&o.useDefaultMasks, "use-default-field-masks", false, "Ask only for the fields that the text formats show")
	addGroup(cmd, "Other", fs)

	completions := flowfilter.Completions()
	completions["output"] = []string{"compact", "dict", "table", "json", "jsonpb", "flat"}
	completions["color"] = []string{"auto", "always", "never"}
	for _, f := range timeval.Formats() {
		completions["time-format"] = append(completions["time-format"], f.Name)
	}
	complete(cmd, completions)
}

// observe shows flows from a server or a file.
func (a *app) observe(ctx context.Context, o *observeFlags) error {
	opts, err := o.printerOptions(a)
	if err != nil {
		return err
	}
	allow, deny, err := o.lists()
	if err != nil {
		return err
	}
	// A bad value is refused here, in words about the value: servers differ in what they say.
	matcher, err := flowmatch.Compile(allow, deny)
	if err != nil {
		return err
	}
	plan, err := o.plan(a.Now(), opts.Location)
	if err != nil {
		return err
	}
	req := &observer.GetFlowsRequest{
		Number: plan.Number, First: plan.First, Follow: plan.Follow, Since: plan.Since, Until: plan.Until,
		Whitelist: allow, Blacklist: deny,
	}
	if req.FieldMask, err = o.mask(opts.Format); err != nil {
		return err
	}
	if o.printRawFilters {
		return flowfilter.WriteRaw(a.Out, allow, deny)
	}
	// Ends the call when the output cannot be written.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	var recv stage.Recv[*observerv1.GetFlowsResponse]
	if o.inputFile != "" {
		in, err := a.openInput(o.inputFile)
		if err != nil {
			return err
		}
		defer in.Close()
		recv = flowsource.File(in, flowsource.FileOptions{Matcher: matcher, Since: plan.Since, Until: plan.Until, Log: a.log()})
		if plan.First {
			recv = stage.Head(recv, flowsource.FlowTime, plan.Number)
		}
	} else {
		conn, err := a.dialObserver(ctx)
		if err != nil {
			return err
		}
		defer conn.Close()
		if recv, err = flowsource.Server(ctx, conn, req); err != nil {
			return a.server.Explain("GetFlows", err)
		}
		if !plan.NotBefore.IsZero() {
			recv = stage.NotBefore(recv, flowsource.FlowTime, plan.NotBefore)
		}
	}
	if plan.Tail > 0 {
		recv = stage.Tail(recv, flowsource.FlowTime, plan.Tail)
	}
	return pump(ctx, a, "GetFlows", opts, recv, (*printer.Printer).Record)
}

func (o *observeFlags) printerOptions(a *app) (printer.Options, error) {
	opts, err := o.format.options()
	if err != nil {
		return opts, err
	}
	if opts.Format == printer.Table && o.selection.Follow {
		return opts, errTableFollow
	}
	switch strings.ToLower(o.color) {
	case "always":
		opts.Color = true
	case "never":
	case "auto":
		opts.Color = a.colorByDefault()
	default:
		return opts, fmt.Errorf("invalid --color: %s, expected auto, always or never", o.color)
	}
	opts.Numeric = o.numeric || !o.ipTranslation
	opts.Stats = o.stats
	opts.Debug = a.debug
	if !o.silentErrors {
		opts.Err = a.Err
	}
	return opts, nil
}

func (a *app) colorByDefault() bool {
	noColor, _ := a.Lookup("NO_COLOR")
	term, _ := a.Lookup("TERM")
	return a.Terminal && noColor == "" && term != "dumb"
}

// lists returns the filters of the flags and of the raw lists.
func (o *observeFlags) lists() (allow, deny []*flow.FlowFilter, err error) {
	if err := o.filters.Finish(); err != nil {
		return nil, nil, err
	}
	rawAllow, err := flowfilter.ParseRaw(o.allowlist)
	if err != nil {
		return nil, nil, fmt.Errorf("invalid --allowlist flag: %w", err)
	}
	rawDeny, err := flowfilter.ParseRaw(o.denylist)
	if err != nil {
		return nil, nil, fmt.Errorf("invalid --denylist flag: %w", err)
	}
	return append(o.filters.Allow(), rawAllow...), append(o.filters.Deny(), rawDeny...), nil
}

func (o *observeFlags) plan(now time.Time, zone *time.Location) (selection.Plan, error) {
	if o.inputFile != "" {
		return o.selection.ForFile(now, zone)
	}
	return o.selection.ForServer(now, zone)
}

func (o *observeFlags) mask(format printer.Format) (*fieldmaskpb.FieldMask, error) {
	paths := o.fieldMask
	switch isJSON := format == printer.JSON || format == printer.Flat; {
	case !isJSON && len(paths) > 0:
		return nil, fmt.Errorf("%s output format is not compatible with custom field mask", o.format.output)
	case !isJSON && o.useDefaultMasks:
		paths = printedFields
	}
	if len(paths) == 0 {
		return nil, nil
	}
	mask, err := fieldmaskpb.New(&flow.Flow{}, paths...)
	if err != nil {
		return nil, fmt.Errorf("failed to construct field mask: %w", err)
	}
	return mask, nil
}

func (a *app) openInput(name string) (io.ReadCloser, error) {
	if name == "-" {
		return io.NopCloser(a.In), nil
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, fmt.Errorf("open --input-file: %w", err)
	}
	return f, nil
}

// complete offers fixed values for flags.
func complete(cmd *cobra.Command, values map[string][]string) {
	for name, list := range values {
		if cmd.Flags().Lookup(name) == nil {
			continue
		}
		fixed := slices.Clone(list)
		// The flag exists and has no completion yet: nothing can fail.
		_ = cmd.RegisterFlagCompletionFunc(name, func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return fixed, cobra.ShellCompDirectiveNoFileComp
		})
	}
}
