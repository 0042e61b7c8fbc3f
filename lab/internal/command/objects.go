// SPDX-License-Identifier: Apache-2.0

package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	labv1 "github.com/weirmesh/weir/gen/weir/lab/v1"
	"github.com/weirmesh/weir/lab"
)

func applyCommand() *cobra.Command {
	return filesCommand("apply", "Create or change the objects of manifests", func(ctx context.Context, client labv1.LabServiceClient, files []*labv1.ManifestFile) ([]string, error) {
		response, err := client.Apply(ctx, &labv1.ApplyRequest{Files: files})
		return response.GetResults(), err
	})
}

func deleteCommand() *cobra.Command {
	return filesCommand("delete", "Delete the objects that manifests name", func(ctx context.Context, client labv1.LabServiceClient, files []*labv1.ManifestFile) ([]string, error) {
		response, err := client.Delete(ctx, &labv1.DeleteRequest{Files: files})
		return response.GetResults(), err
	})
}

func filesCommand(use, short string, do func(context.Context, labv1.LabServiceClient, []*labv1.ManifestFile) ([]string, error)) *cobra.Command {
	var name string
	var paths []string
	command := &cobra.Command{
		Use:   use + " -f FILE|FOLDER|-",
		Short: short,
		Args:  cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			files, err := readFiles(paths, command.InOrStdin())
			if err != nil {
				return err
			}
			return call(command.Context(), name, func(ctx context.Context, client labv1.LabServiceClient) error {
				results, err := do(ctx, client, files)
				for _, result := range results {
					fmt.Fprintln(command.OutOrStdout(), result)
				}
				return err
			})
		},
	}
	nameFlag(command, &name)
	command.Flags().StringArrayVarP(&paths, "filename", "f", nil, "`file or folder` of manifests, or - for standard input; repeatable")
	if err := command.MarkFlagRequired("filename"); err != nil {
		// The flag is the one of the line above.
		panic(err)
	}
	return command
}

// resetWait is how long a reset waits for the new pods.
const resetWait = 30 * time.Second

func resetCommand() *cobra.Command {
	var name string
	var paths []string
	wait := resetWait
	command := &cobra.Command{
		Use:   "reset [-f FILE|FOLDER|-]",
		Short: "Make the objects of a lab exactly those of manifests, its nodes aside; without manifests, empty it",
		Args:  cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			var files []*labv1.ManifestFile
			if len(paths) > 0 {
				var err error
				if files, err = readFiles(paths, command.InOrStdin()); err != nil {
					return err
				}
			}
			return call(command.Context(), name, func(ctx context.Context, client labv1.LabServiceClient) error {
				response, err := client.Reset(ctx, &labv1.ResetRequest{Files: files, WaitSeconds: uint32(wait.Seconds())})
				for _, result := range response.GetResults() {
					fmt.Fprintln(command.OutOrStdout(), result)
				}
				if err == nil && len(response.GetWaiting()) > 0 {
					return fmt.Errorf("not ready after %s:\n  %s", wait, strings.Join(response.GetWaiting(), "\n  "))
				}
				return err
			})
		},
	}
	nameFlag(command, &name)
	command.Flags().StringArrayVarP(&paths, "filename", "f", nil, "`file or folder` of manifests, or - for standard input; repeatable")
	command.Flags().DurationVar(&wait, "wait", wait, "`time` that the new pods may take to be ready; 0 = do not wait")
	return command
}

func getCommand() *cobra.Command {
	var name string
	command := &cobra.Command{
		Use:   "get KIND [NAMESPACE/NAME|NAME]",
		Short: "Print objects as JSON, one a line, status included; a NAME alone is of any namespace",
		Args:  cobra.RangeArgs(1, 2),
		RunE: func(command *cobra.Command, args []string) error {
			request := &labv1.ListObjectsRequest{Kind: args[0]}
			if len(args) == 2 {
				namespace, object, ok := strings.Cut(args[1], "/")
				if !ok {
					namespace, object = "", args[1]
				}
				request.Namespace, request.Name = namespace, object
			}
			return call(command.Context(), name, func(ctx context.Context, client labv1.LabServiceClient) error {
				response, err := client.ListObjects(ctx, request)
				for _, object := range response.GetObjects() {
					fmt.Fprintf(command.OutOrStdout(), "%s\n", object)
				}
				if err == nil && request.GetName() != "" && len(response.GetObjects()) == 0 {
					return fmt.Errorf("%s %s not found", args[0], args[1])
				}
				return err
			})
		},
	}
	nameFlag(command, &name)
	return command
}

func readFiles(paths []string, stdin io.Reader) ([]*labv1.ManifestFile, error) {
	var files []*labv1.ManifestFile
	for _, path := range paths {
		if path == "-" {
			data, err := io.ReadAll(stdin)
			if err != nil {
				return nil, fmt.Errorf("read standard input: %w", err)
			}
			files = append(files, &labv1.ManifestFile{Name: "-", Data: data})
			continue
		}
		names, err := lab.ManifestFiles(path)
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			data, err := os.ReadFile(filepath.Clean(name))
			if err != nil {
				return nil, fmt.Errorf("read manifests: %w", err)
			}
			files = append(files, &labv1.ManifestFile{Name: name, Data: data})
		}
	}
	if len(files) == 0 {
		return nil, errors.New("no manifest files (.yaml, .yml, .json) found")
	}
	return files, nil
}

func partCommand() *cobra.Command {
	command := &cobra.Command{
		Use:   "part",
		Short: "Kill, stop and start Weir's own parts, to see what holds when one fails",
	}
	for _, action := range []struct {
		use, short string
		action     labv1.ControlPartRequest_Action
	}{
		{"kill", "End a part with SIGKILL; it stays down", labv1.ControlPartRequest_ACTION_KILL},
		{"stop", "Ask a part to end; it stays down", labv1.ControlPartRequest_ACTION_STOP},
		{"start", "Start a part that is down", labv1.ControlPartRequest_ACTION_START},
		{"replace", "Start a new process beside the running one, from which it takes over (proxies)", labv1.ControlPartRequest_ACTION_REPLACE},
		{"crash", "End a part with SIGKILL; the lab starts it again", labv1.ControlPartRequest_ACTION_CRASH},
	} {
		var name string
		sub := &cobra.Command{
			Use: action.use + " PART", Short: action.short, Args: cobra.ExactArgs(1),
			RunE: func(command *cobra.Command, args []string) error {
				return call(command.Context(), name, func(ctx context.Context, client labv1.LabServiceClient) error {
					response, err := client.ControlPart(ctx, &labv1.ControlPartRequest{Part: args[0], Action: action.action})
					if err == nil {
						fmt.Fprintf(command.OutOrStdout(), "%s %s\n", response.GetPart().GetName(), response.GetPart().GetState())
					}
					return err
				})
			},
		}
		nameFlag(sub, &name)
		command.AddCommand(sub)
	}
	return command
}
