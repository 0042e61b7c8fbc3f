// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/weirmesh/weir/cli/internal/listing"
	"github.com/weirmesh/weir/cli/internal/policytext"
	"github.com/weirmesh/weir/cli/internal/printer"
	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
)

// maxPolicyFile bounds what is sent for validation.
const maxPolicyFile = 32 << 20

func (a *app) policyValidateCommand() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use: "validate FILE|-", Short: "Check policies, and say what they would change, without changing anything", Args: oneArgument("a file, or - for standard input"),
		Long: `Check the policies of a file, and say what they would change, without changing anything: each document as if those
before it were applied. The exit code is 1 if any is not valid, or needs something that Weir does not enforce yet.`,
		Example: `  weir policy validate policy.yaml
  kustomize build overlays/production | weir policy validate -`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := oneOf(output, "text", "json"); err != nil {
				return err
			}
			return a.validatePolicies(cmd.Context(), args[0], output)
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "text", "Output format: text, json")
	complete(cmd, map[string][]string{"output": {"text", "json"}})
	return cmd
}

func (a *app) validatePolicies(ctx context.Context, file, output string) error {
	data, err := a.readFile(file)
	if err != nil {
		return err
	}
	name := file
	if file == "-" {
		name = "standard input"
	}
	documents, err := askPolicy(ctx, a, func(ctx context.Context, c policyv1.PolicyQueryServiceClient) ([]*policyv1.Validated, error) {
		r, err := c.ValidatePolicies(ctx, &policyv1.ValidatePoliciesRequest{Documents: data, File: name})
		return r.GetDocuments(), err
	})
	if err != nil {
		return err
	}
	if len(documents) == 0 {
		return fmt.Errorf("%s: there is no document in it", name)
	}
	if output == "json" {
		items := make([]listing.Item, 0, len(documents))
		for _, d := range documents {
			items = append(items, listing.Item{Message: d})
		}
		if err := listing.JSON(a.Out, items); err != nil {
			return err
		}
	} else {
		for i, d := range documents {
			showValidated(a.Out, fmt.Sprintf("%s, document %d", name, i+1), d)
		}
	}
	return verdictOn(name, documents)
}

func (a *app) readFile(file string) ([]byte, error) {
	from, name := a.In, "standard input"
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		from, name = f, file
	}
	data, err := io.ReadAll(io.LimitReader(from, maxPolicyFile+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	if len(data) > maxPolicyFile {
		return nil, fmt.Errorf("%s is larger than %d MiB", name, maxPolicyFile>>20)
	}
	return data, nil
}

func showValidated(w io.Writer, where string, d *policyv1.Validated) {
	object := policytext.Object(d.GetKind(), d.GetNamespace(), d.GetName())
	if object == "" {
		object = "(no policy)"
	}
	line := func(format string, args ...any) {
		fmt.Fprintln(w, printer.Safe(fmt.Sprintf(format, args...)))
	}
	switch {
	case d.GetNotYet() != "":
		line("%s: %s: NOT YET", where, object)
		line("  field %s: it is valid, but Weir does not enforce it yet, and refuses the policy whole", d.GetNotYet())
	case d.GetError() != "":
		line("%s: %s: NOT VALID", where, object)
		text := policytext.Bare(d.GetError(), object, d.GetField())
		if d.GetField() != "" {
			text = "field " + d.GetField() + ": " + text
		}
		line("  %s", text)
	default:
		line("%s: %s: valid", where, object)
		for _, c := range inOrder(d.GetChanges()) {
			line("  %s", c)
		}
	}
}

// inOrder puts what is said of endpoints before what is said of connections.
func inOrder(changes []string) []string {
	return slices.SortedStableFunc(slices.Values(changes), func(a, b string) int {
		return cmp.Compare(strings.Count(a, " -> "), strings.Count(b, " -> "))
	})
}

// verdictOn counts what is not valid; nil = everything is.
func verdictOn(name string, documents []*policyv1.Validated) error {
	invalid, notYet := 0, 0
	for _, d := range documents {
		switch {
		case d.GetNotYet() != "":
			notYet++
		case d.GetError() != "":
			invalid++
		}
	}
	var words []string
	if invalid > 0 {
		words = append(words, fmt.Sprintf("%d not valid", invalid))
	}
	if notYet > 0 {
		words = append(words, fmt.Sprintf("%d not enforceable yet", notYet))
	}
	if len(words) == 0 {
		return nil
	}
	return fmt.Errorf("%s: of %d documents %s", name, len(documents), strings.Join(words, " and "))
}
