// SPDX-License-Identifier: Apache-2.0

package command

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	labv1 "github.com/weirmesh/weir/gen/weir/lab/v1"
	"github.com/weirmesh/weir/lab/internal/launch"
)

// end is a place in a lab where a command can run.
type end struct {
	// namespace and name are a pod's; a host outside of the cluster has no namespace.
	namespace, name string
	// node is a node's name; then the others are empty.
	node string
}

// target reads NAMESPACE/POD; a name alone is a pod of the namespace default, host/NAME a host outside of the cluster, and node/NAME a node.
func target(text string) (end, error) {
	namespace, name, ok := strings.Cut(text, "/")
	if !ok {
		namespace, name = "default", text
	}
	if name == "" || strings.Contains(name, "/") {
		return end{}, fmt.Errorf("expected NAMESPACE/POD, host/NAME or node/NAME, got %q", text)
	}
	switch namespace {
	case "host":
		return end{name: name}, nil
	case "node":
		return end{node: name}, nil
	}
	return end{namespace: namespace, name: name}, nil
}

// resolve finds the one pod that a name means: a pod of that name, or the only one of a Deployment of that name.
func resolve(ctx context.Context, client labv1.LabServiceClient, namespace, name string) (string, error) {
	if namespace == "" {
		return name, nil
	}
	response, err := client.GetLab(ctx, &labv1.GetLabRequest{})
	if err != nil {
		return "", err
	}
	var begin []string
	for _, pod := range response.GetPods() {
		if pod.GetNamespace() != namespace {
			continue
		}
		if pod.GetName() == name {
			return name, nil
		}
		hash := pod.GetLabels()["pod-template-hash"]
		if hash != "" && strings.HasPrefix(pod.GetName(), name+"-"+hash+"-") {
			begin = append(begin, pod.GetName())
		}
	}
	switch len(begin) {
	case 1:
		return begin[0], nil
	case 0:
		return name, nil
	}
	return "", fmt.Errorf("deployment %s/%s has several pods, name one of %s", namespace, name, strings.Join(begin, ", "))
}

func execCommand() *cobra.Command {
	var name, container string
	command := &cobra.Command{
		Use:   "exec NAMESPACE/POD -- COMMAND [ARGUMENT...]",
		Short: "Run a command in a pod's place; host/NAME is a host outside of the cluster, node/NAME a node",
		Long: "Run a command in a pod's network, mount and UTS namespaces and control group. Terminal, standard input and exit code are the command's own.\n" +
			"POD may be the name of a Deployment with one pod.",
		Args: cobra.MinimumNArgs(2),
		RunE: func(command *cobra.Command, args []string) error {
			at, err := target(args[0])
			if err != nil {
				return err
			}
			var spec launch.Spec
			err = call(command.Context(), name, func(ctx context.Context, client labv1.LabServiceClient) error {
				pod, err := resolve(ctx, client, at.namespace, at.name)
				if err != nil {
					return err
				}
				response, err := client.LocatePod(ctx, &labv1.LocatePodRequest{Namespace: at.namespace, Name: pod, Node: at.node, Container: container})
				if err != nil {
					return err
				}
				return json.Unmarshal(response.GetLaunch(), &spec)
			})
			if err != nil {
				return err
			}
			spec.Args = args[1:]
			if term := os.Getenv("TERM"); term != "" {
				spec.Env = append(spec.Env, "TERM="+term)
			}
			err = spec.Run()
			fmt.Fprintln(os.Stderr, "weir-lab: exec:", err)
			os.Exit(launch.ExitCode(err))
			return nil
		},
	}
	nameFlag(command, &name)
	command.Flags().StringVarP(&container, "container", "c", "", "`name` of the container (default: the first)")
	command.Flags().SetInterspersed(true)
	return command
}

func logsCommand() *cobra.Command {
	var name, container string
	var follow bool
	var tail int32
	command := &cobra.Command{
		Use:   "logs NAMESPACE/POD",
		Short: "Show what a container wrote; host/NAME is a host outside of the cluster",
		Args:  cobra.ExactArgs(1),
		RunE: func(command *cobra.Command, args []string) error {
			at, err := target(args[0])
			if err != nil {
				return err
			}
			if at.node != "" {
				return errors.New("a node has no log; `weir lab status` names those of its parts")
			}
			return call(command.Context(), name, func(ctx context.Context, client labv1.LabServiceClient) error {
				pod, err := resolve(ctx, client, at.namespace, at.name)
				if err != nil {
					return err
				}
				request := &labv1.ReadLogsRequest{Namespace: at.namespace, Name: pod, Container: container, Follow: follow}
				if tail >= 0 {
					request.Tail = &tail
				}
				stream, err := client.ReadLogs(ctx, request)
				if err != nil {
					return err
				}
				for {
					response, err := stream.Recv()
					if errors.Is(err, io.EOF) {
						return nil
					}
					if err != nil {
						return err
					}
					if _, err := command.OutOrStdout().Write(response.GetData()); err != nil {
						return fmt.Errorf("write: %w", err)
					}
				}
			})
		},
	}
	nameFlag(command, &name)
	command.Flags().StringVarP(&container, "container", "c", "", "`name` of the container (default: the first)")
	command.Flags().BoolVarP(&follow, "follow", "f", false, "go on with what is written later")
	command.Flags().Int32Var(&tail, "tail", -1, "only the last `lines`")
	return command
}
