// SPDX-License-Identifier: Apache-2.0

package flowmatch

import (
	"fmt"

	"cel.dev/cel-go/cel"

	"github.com/weirmesh/weir/gen/flow"
)

// celExpressions compiles CEL over the variable _flow. An expression that fails on a flow does not match it.
func celExpressions(f *flow.FlowFilter) (predicate, error) {
	expressions := f.GetExperimental().GetCelExpression()
	if len(expressions) == 0 {
		return nil, nil
	}
	env, err := cel.NewEnv(cel.Container("flow"), cel.Types(&flow.Flow{}), cel.Variable("_flow", cel.ObjectType("flow.Flow")))
	if err != nil {
		return nil, fmt.Errorf("error creating CEL env: %w", err)
	}
	return anyOf(expressions, func(v string) (predicate, error) {
		ast, issues := env.Compile(v)
		if issues.Err() != nil {
			return nil, fmt.Errorf("error compiling CEL expression: %w", issues.Err())
		}
		if ast.OutputType() != cel.BoolType {
			return nil, fmt.Errorf("error compiling CEL expression: expected result type bool, got %s", ast.OutputType())
		}
		program, err := env.Program(ast)
		if err != nil {
			return nil, fmt.Errorf("error compiling CEL expression: %w", err)
		}
		return func(f *flow.Flow) bool {
			out, _, err := program.Eval(map[string]any{"_flow": f})
			if err != nil {
				return false
			}
			b, ok := out.Value().(bool)
			return ok && b
		}, nil
	})
}
