// SPDX-License-Identifier: Apache-2.0

// Package command is the command line of weir-lab.
package command

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	labv1 "github.com/weirmesh/weir/gen/weir/lab/v1"
	"github.com/weirmesh/weir/internal/version"
	"github.com/weirmesh/weir/lab"
)

// ErrSaid ends a command whose failure was printed already.
var ErrSaid = errors.New("failed")

// Root returns the command.
func Root() *cobra.Command {
	root := &cobra.Command{
		Use:           "weir-lab",
		Short:         "A cluster inside one machine",
		Long:          "weir-lab builds a small cluster out of network namespaces, with Weir's real agents and services, and runs the pods of Kubernetes manifests in it.",
		Version:       version.Version,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.AddCommand(upCommand(), downCommand(), statusCommand(), applyCommand(), deleteCommand(), resetCommand(), getCommand(), execCommand(), logsCommand(), partCommand(), natsCommand(), centralCommand())
	return root
}

// nameFlag adds --name; the environment gives its default.
func nameFlag(command *cobra.Command, name *string) {
	value := os.Getenv("WEIR_LAB")
	if value == "" {
		value = lab.DefaultConfig().Name
	}
	command.Flags().StringVar(name, "name", value, "`name` of the lab (environment WEIR_LAB)")
}

// maxMessage is for logs and large labs.
const maxMessage = 64 << 20

// call talks to a lab's supervisor.
func call(ctx context.Context, name string, f func(context.Context, labv1.LabServiceClient) error) error {
	if err := lab.CheckName(name); err != nil {
		return err
	}
	socket := lab.Socket(name)
	if _, err := os.Stat(socket); errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("lab %s is not up; start it with `weir lab up%s`", name, nameArgument(name))
	} else if errors.Is(err, os.ErrPermission) {
		return fmt.Errorf("no access to lab %s: run as root", name)
	}
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)))
	if err != nil {
		return fmt.Errorf("open %s: %w", socket, err)
	}
	defer conn.Close()
	err = f(ctx, labv1.NewLabServiceClient(conn))
	said, ok := status.FromError(err)
	switch {
	case err == nil || !ok:
		return err
	case said.Code() == codes.Unavailable:
		return fmt.Errorf("the supervisor of lab %s does not answer (%s); `weir lab down%s` removes what it left", name, said.Message(), nameArgument(name))
	}
	return errors.New(said.Message())
}

func nameArgument(name string) string {
	if name == lab.DefaultConfig().Name {
		return ""
	}
	return " --name " + name
}
