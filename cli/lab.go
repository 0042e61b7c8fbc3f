// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"fmt"

	"github.com/spf13/cobra"
)

// labCommand hands everything behind `weir lab` to weir-lab.
func (a *app) labCommand() *cobra.Command {
	return &cobra.Command{
		Use: "lab", Short: "Run a cluster inside this machine",
		Long: "Run a cluster of network namespaces inside this machine. `weir lab --help` lists what it can do.",
		Example: `  weir lab up --manifests examples/todo/manifests
  weir lab exec default/client -- curl -s http://todoui:8090/
  weir lab down`,
		DisableFlagParsing: true,
		RunE: func(_ *cobra.Command, args []string) error {
			if err := a.Exec(args); err != nil {
				return fmt.Errorf("start weir-lab: %w", err)
			}
			return nil
		},
	}
}
