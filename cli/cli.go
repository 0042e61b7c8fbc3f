// SPDX-License-Identifier: Apache-2.0

// Package cli is the weir command: flows and state of the mesh for a person at
// a terminal. It imports gen/ and public libraries only, and speaks to the
// observer over TCP and to all else over the unix sockets under /run/weir.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"github.com/weirmesh/weir/cli/internal/observer"
	"github.com/weirmesh/weir/cli/internal/printer"
	"github.com/weirmesh/weir/cli/internal/rundir"
)

// Env is all that a command takes from its surroundings.
type Env struct {
	In       io.Reader
	Out, Err io.Writer
	// Terminal says that Out is one.
	Terminal bool
	// Lookup reads an environment variable.
	Lookup func(name string) (string, bool)
	Now    func() time.Time
	// Exec replaces the process by weir-lab; it returns only with an error.
	Exec func(args []string) error
	// Program finds one of Weir's programs; Start runs one and waits for its end.
	Program func(name string) (path string, err error)
	Start   func(ctx context.Context, path string, args []string, out, errOut io.Writer) error
	Version string
	// DialOptions are added to every connection to an observer.
	DialOptions []grpc.DialOption
}

// Run executes the command line (without the program's name) and returns the exit code.
func Run(ctx context.Context, env Env, args []string) int {
	root := New(env)
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	var said *exit
	if errors.As(err, &said) {
		return said.code
	}
	// What a server said may be part of it.
	fmt.Fprintln(env.Err, printer.Safe(err.Error()))
	return 1
}

// exit ends a command with a code of its own, after all was said.
type exit struct{ code int }

func (e *exit) Error() string { return fmt.Sprintf("exit code %d", e.code) }

// app is what the subcommands share.
type app struct {
	Env
	server observer.Config
	// serverGiven says that --server or its variable was set; a --lab that is typed outweighs the variable.
	serverGiven bool
	debug       bool
	lab, runDir string
}

// New returns the weir command with all its subcommands.
func New(env Env) *cobra.Command {
	a := &app{Env: env}
	root := &cobra.Command{
		Use:   "weir",
		Short: "See what flows through the mesh, and how the mesh is",
		Long: `weir shows what flows through the mesh, and how the mesh is.

Every flag can be set by a variable as well: WEIR_SERVER for --server, WEIR_LAB for --lab, and so on.`,
		Example: `  weir observe -f                                    # flows as they happen
  weir observe --namespace default --verdict DROPPED # what was refused
  weir status --wait                                 # is everything up?
  weir lab up                                        # a cluster inside this machine`,
		SilenceErrors:     true,
		SilenceUsage:      true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error { return a.prepare(cmd) },
	}
	root.SetIn(env.In)
	root.SetOut(env.Out)
	root.SetErr(env.Err)
	flags := root.PersistentFlags()
	flags.BoolVarP(&a.debug, "debug", "D", false, "Log what the command does, and show every state of the nodes")
	flags.StringVar(&a.lab, "lab", "", "Lab to speak to; without it the only one that runs")
	flags.StringVar(&a.runDir, "run-dir", rundir.Default, "Folder of Weir's unix sockets")
	a.server.Register(flags)

	root.AddCommand(
		a.observeCommand(), a.statusCommand(), a.listCommand(), a.endpointCommand(), a.identityCommand(),
		a.serviceCommand(), a.policyCommand(), a.bpfCommand(), a.monitorCommand(), a.cleanupCommand(), a.labCommand(), a.versionCommand(),
	)
	root.InitDefaultCompletionCmd()
	setUsage(root)
	return root
}

// prepare runs before each command.
func (a *app) prepare(cmd *cobra.Command) error {
	typedServer, typedLab := cmd.Flags().Changed("server"), cmd.Flags().Changed("lab")
	if err := applyEnvironment(cmd.Flags(), a.Lookup); err != nil {
		return err
	}
	a.serverGiven = typedServer || cmd.Flags().Changed("server") && !typedLab
	return nil
}

func (a *app) log() *slog.Logger {
	level := slog.LevelInfo
	if a.debug {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(a.Err, &slog.HandlerOptions{Level: level}))
}

// dialObserver connects to --server, or to the observer of --lab when only that is given.
func (a *app) dialObserver(ctx context.Context) (*grpc.ClientConn, error) {
	if !a.serverGiven && a.lab != "" {
		place, err := rundir.Find(a.runDir, a.lab)
		if err != nil {
			return nil, err
		}
		lab, err := a.askLab(ctx, place)
		if err != nil {
			return nil, fmt.Errorf("ask lab %s for its observer: %w", a.lab, err)
		}
		if lab.GetObserver() != "" {
			a.server.Server = lab.GetObserver()
		}
	}
	if err := a.server.Validate(); err != nil {
		return nil, err
	}
	a.log().Debug("dialing", "server", a.server.Server)
	return a.server.Dial(a.DialOptions...)
}

// noArgs refuses arguments that no flag took.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return fmt.Errorf("%s takes no argument, got %q: see `%s --help`", cmd.CommandPath(), args[0], cmd.CommandPath())
	}
	return nil
}

// group makes a command that only holds others.
func group(use, short string, children ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{
		Use: use, Short: short,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return fmt.Errorf("unknown command %q for %q", args[0], cmd.CommandPath())
			}
			return cmd.Help()
		},
	}
	cmd.AddCommand(children...)
	return cmd
}

// interrupted says that the person ended the command; this is no failure.
func interrupted(ctx context.Context, err error) bool {
	return ctx.Err() != nil && errors.Is(ctx.Err(), context.Canceled) && err != nil
}
