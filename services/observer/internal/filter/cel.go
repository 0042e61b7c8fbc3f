// SPDX-License-Identifier: Apache-2.0

package filter

import (
	"fmt"

	"cel.dev/cel-go/cel"

	"github.com/weirmesh/weir/gen/flow"
)

// celCost bounds what one evaluation may cost, in the library's units: an expression comes from
// outside and runs for every flow.
const celCost = 100_000

func compileCEL(f *flow.FlowFilter) (Match, error) {
	list := f.GetExperimental().GetCelExpression()
	if len(list) == 0 {
		return nil, nil
	}
	env, err := cel.NewEnv(
		cel.Container("flow"), // so that Verdict.DROPPED is found
		cel.Types(&flow.Flow{}),
		cel.Variable("_flow", cel.ObjectType("flow.Flow")), // "flow" is the package
	)
	if err != nil {
		return nil, fmt.Errorf("make CEL environment: %w", err)
	}
	var programs []cel.Program
	for _, text := range list {
		ast, issues := env.Compile(text)
		if issues.Err() != nil {
			return nil, fmt.Errorf("error compiling CEL expression: %w", issues.Err())
		}
		if ast.OutputType() != cel.BoolType {
			return nil, fmt.Errorf("error compiling CEL expression: got %q, wanted %q result type", ast.OutputType(), cel.BoolType)
		}
		program, err := env.Program(ast, cel.CostLimit(celCost))
		if err != nil {
			return nil, fmt.Errorf("error building CEL program: %w", err)
		}
		programs = append(programs, program)
	}
	return func(fl *flow.Flow) bool {
		input := map[string]any{"_flow": fl}
		for _, program := range programs {
			out, _, err := program.Eval(input)
			if err != nil {
				return false // Hubble's rule: what cannot be decided is no match
			}
			if yes, ok := out.Value().(bool); ok && yes {
				return true
			}
		}
		return false
	}, nil
}
