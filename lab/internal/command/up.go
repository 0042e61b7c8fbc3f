// SPDX-License-Identifier: Apache-2.0

package command

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"

	labv1 "github.com/weirmesh/weir/gen/weir/lab/v1"
	"github.com/weirmesh/weir/lab"
)

// readyFD is where a detached lab says that it is ready, or why it is not. The number comes by the environment, so that the command line
// of both processes is the same.
const readyEnv = "WEIR_LAB_READY_FD"

func upCommand() *cobra.Command {
	config := lab.DefaultConfig()
	var detach bool
	var aggregation, ringBytes, reportInterval string
	var families []string
	command := &cobra.Command{
		Use:   "up",
		Short: "Build a cluster and run it until Ctrl-C",
		Args:  cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			self, err := os.Executable()
			if err != nil {
				return fmt.Errorf("find this program: %w", err)
			}
			config.Self = self
			for flag, value := range map[string]string{"--aggregation": aggregation, "--ring-bytes": ringBytes, "--report-interval": reportInterval} {
				if value != "" {
					// First, so that --agent-arg can still differ for one node.
					config.AgentArgs = append([]string{flag + "=" + value}, config.AgentArgs...)
				}
			}
			if command.Flags().Changed("ip-families") {
				config.Families = nil
				for _, family := range families {
					config.Families = append(config.Families, corev1.IPFamily(family))
				}
			}
			if command.Flags().Changed("nodes") && config.Nodes == 0 {
				return errors.New("nodes: expected 1 or more, got 0")
			}
			if detach && os.Getenv(readyEnv) == "" {
				return upDetached(command, config)
			}
			return up(command.Context(), config)
		},
	}
	flags := command.Flags()
	nameFlag(command, &config.Name)
	flags.IntVar(&config.Nodes, "nodes", config.Nodes, "`number` of nodes (default: those of the manifests, or 2)")
	flags.StringArrayVar(&config.Manifests, "manifests", nil, "`file or folder` of Kubernetes manifests; changes are followed; repeatable")
	flags.StringVar(&config.ObserverListen, "observer-listen", config.ObserverListen, "`address` of the observer's API on this machine")
	flags.BoolVarP(&detach, "detach", "d", false, "return when everything is ready; end it with `weir lab down`")
	flags.BoolVar(&config.Separate, "separate", false, "run NATS and each central service as a process of its own")
	flags.IntVar(&config.Policies, "policies", config.Policies, "`number` of policy services (with --separate)")
	flags.IntVar(&config.Brokers, "brokers", config.Brokers, "`number` of identity brokers (with --separate)")
	flags.IntVar(&config.XDS, "xds", config.XDS, "`number` of xDS servers (with --separate)")
	flags.IntVar(&config.Relays, "relays", config.Relays, "`number` of relays (with --separate)")
	flags.StringVar(&aggregation, "aggregation", "", "the agents' aggregation of flows: none or medium (default: the agents' own)")
	flags.StringVar(&ringBytes, "ring-bytes", "", "`bytes` of all ring buffers of a node (default: the agents' own)")
	flags.StringVar(&reportInterval, "report-interval", "", "`time` between reports of a live connection (default: the agents' own)")
	flags.StringArrayVar(&config.AgentArgs, "agent-arg", nil, "further `argument` of every agent, or of one: node1:--flag=value; repeatable")
	flags.StringArrayVar(&config.PolicyArgs, "policy-arg", nil, "further `argument` of the policy services; repeatable")
	flags.StringArrayVar(&config.DNSArgs, "dns-arg", nil, "further `argument` of every weir-dns, or of one: node1:--flag=value; repeatable")
	flags.StringArrayVar(&config.ProxyArgs, "proxy-arg", nil, "further `argument` of every proxy, or of one: node1:--flag=value; repeatable")
	flags.StringVar(&config.ProxyBinary, "proxy-binary", "", "an Envoy `binary` to run in the place of weir-proxy")
	flags.StringArrayVar(&config.XDSArgs, "xds-arg", nil, "further `argument` of the xDS servers; repeatable")
	flags.StringArrayVar(&config.IdentityArgs, "identity-arg", nil, "further `argument` of the identity brokers; repeatable")
	flags.StringArrayVar(&config.RelayArgs, "relay-arg", nil, "further `argument` of the relays (with --separate); repeatable")
	flags.StringArrayVar(&config.ObserverArgs, "observer-arg", nil, "further `argument` of the observer (with --separate); repeatable")
	flags.StringSliceVar(&families, "ip-families", []string{"IPv4", "IPv6"}, "address `families` of nodes, pods and services: IPv4, IPv6 or both, the first one preferred")
	flags.StringVar(&config.ClusterName, "cluster-name", config.ClusterName, "`name` of the cluster in labels and flows")
	flags.IntVar(&config.MTU, "mtu", config.MTU, "`bytes` of the fabric's largest packet")
	flags.StringVar(&config.LogLevel, "log-level", config.LogLevel, "of Weir's parts: debug, info, warn or error")
	flags.DurationVar(&config.Timeout, "timeout", config.Timeout, "`time` that Weir, and then the pods, may take to be ready")
	flags.StringVar(&config.BinDir, "bin", "", "`folder` of Weir's programs (default: where weir-lab is)")
	return command
}

// up runs a lab in this process.
func up(ctx context.Context, config lab.Config) error {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	ready := func() { fmt.Fprintln(os.Stdout, "Ctrl-C ends the lab and removes everything.") }
	fail := func(error) {}
	config.Output = os.Stdout
	if text := os.Getenv(readyEnv); text != "" {
		fd, err := strconv.Atoi(text)
		if err != nil {
			return fmt.Errorf("%s: %w", readyEnv, err)
		}
		pipe := os.NewFile(uintptr(fd), "ready")
		syscall.CloseOnExec(fd)
		config.LogToFile = true
		config.Output = io.MultiWriter(os.Stdout, prefixed{pipe})
		ready = func() { fmt.Fprintln(pipe, "ready"); pipe.Close() }
		fail = func(err error) { fmt.Fprintf(pipe, "failed\n%v\n", err); pipe.Close() }
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelInfo}))
	l, err := lab.New(config, log)
	if err != nil {
		fail(err)
		return err
	}
	err = l.Run(ctx, ready)
	if err != nil {
		fail(err)
	}
	return err
}

// prefixed marks lines for whoever waits for a detached lab. After the pipe is closed there is nobody.
type prefixed struct{ w io.Writer }

func (p prefixed) Write(data []byte) (int, error) {
	_, err := fmt.Fprintf(p.w, "say %s", data)
	if err != nil && !errors.Is(err, os.ErrClosed) && !errors.Is(err, syscall.EPIPE) {
		return 0, err
	}
	return len(data), nil
}

// upDetached starts this command again in the background, and waits until that says that it is ready.
func upDetached(command *cobra.Command, config lab.Config) error {
	if err := config.Validate(); err != nil {
		return err
	}
	// The manifests' paths stay valid: the working folder is inherited.
	output, path, err := detachedLog(config.Name)
	if err != nil {
		return err
	}
	defer output.Close()
	read, write, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("start lab: %w", err)
	}
	defer read.Close()
	child := exec.Command(config.Self, os.Args[1:]...)
	child.Env = append(os.Environ(), readyEnv+"=3")
	child.Stdout, child.Stderr = output, output
	child.ExtraFiles = []*os.File{write}
	child.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = child.Start()
	write.Close()
	if err != nil {
		return fmt.Errorf("start lab: %w", err)
	}
	// Ctrl-C while waiting ends the lab as well; it says so on the pipe.
	interrupted, stop := signal.NotifyContext(command.Context(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(interrupted, func() { _ = child.Process.Signal(syscall.SIGTERM) })
	lines := bufio.NewScanner(read)
	for lines.Scan() {
		switch line := lines.Text(); line {
		case "ready":
			os.Remove(path)
			return child.Process.Release()
		case "failed":
			for lines.Scan() {
				fmt.Fprintln(os.Stderr, lines.Text())
			}
			_ = child.Wait()
			os.Remove(path)
			return ErrSaid
		default:
			fmt.Println(trimSay(line))
		}
	}
	err = child.Wait()
	data, _ := os.ReadFile(path) // what there is helps
	os.Remove(path)
	if interrupted.Err() != nil && err == nil {
		return errors.New("interrupted, the lab has ended")
	}
	return fmt.Errorf("the lab ended before it was ready: %w\n%s", err, data)
}

func trimSay(line string) string {
	if len(line) > 4 && line[:4] == "say " {
		return line[4:]
	}
	return line
}

// detachedLog is where a detached lab's first words go; then it has a log of its own, logs/lab.log in its folder.
func detachedLog(name string) (*os.File, string, error) {
	file, err := os.CreateTemp("", "weir-lab-"+name+"-*.log")
	if err != nil {
		return nil, "", fmt.Errorf("open the lab's log: %w", err)
	}
	return file, filepath.Clean(file.Name()), nil
}

func downCommand() *cobra.Command {
	var name string
	command := &cobra.Command{
		Use:   "down",
		Short: "End a lab and remove everything of it, also after a crash",
		Args:  cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			return down(command.Context(), name)
		},
	}
	nameFlag(command, &name)
	return command
}

// downDeadline bounds the wait for a supervisor to end.
const downDeadline = time.Minute

func down(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, downDeadline)
	defer cancel()
	asked := false
	supervised := lab.Supervisor(name)
	for {
		found, err := lab.Clean(name)
		switch {
		case err == nil && supervised():
			// It has removed everything, and is about to end.
		case err == nil && !found && !asked:
			fmt.Printf("lab %s is not up\n", name)
			return nil
		case err == nil:
			fmt.Printf("lab %s is down\n", name)
			return nil
		case err != nil && !errors.Is(err, lab.ErrRunning):
			return err
		}
		if !asked && err != nil {
			err := call(ctx, name, func(ctx context.Context, client labv1.LabServiceClient) error {
				_, err := client.Shutdown(ctx, &labv1.ShutdownRequest{})
				return err
			})
			// Until its socket is there, it is only starting: ask again.
			asked = err == nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("lab %s did not end within %s: %w", name, downDeadline, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}
