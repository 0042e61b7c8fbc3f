// SPDX-License-Identifier: Apache-2.0

package expression

import "regexp/syntax"

// runesPerInstruction is how many bounds of ranges a class of characters may have for one instruction's worth of memory: `\pL` has some 1,300, [a-z] has two.
const runesPerInstruction = 64

// size is what the library would compile a part of an expression to. To measure costs what the text costs, not what the program does: 1,000 characters and
// `{1000}` behind them are a million instructions. The rules are those of the library's Simplify and Compile, which are the oracle of the fuzz test.
type size struct {
	instructions int
	// classes is what large classes weigh beyond their instruction.
	classes int
	// nullable: it matches the empty text. never: it matches nothing.
	nullable, never bool
	// op of the simplified part, and whether it prefers less.
	op   syntax.Op
	lazy bool
}

// sizeOf measures a part as it is once counted repetitions are written out.
func sizeOf(re *syntax.Regexp) size {
	switch re.Op {
	case syntax.OpNoMatch:
		return size{never: true, op: re.Op}
	case syntax.OpLiteral:
		n := max(1, len(re.Rune))
		return size{instructions: n, nullable: len(re.Rune) == 0, op: re.Op}
	case syntax.OpCharClass:
		return size{instructions: 1, classes: len(re.Rune) / runesPerInstruction, op: re.Op}
	case syntax.OpAnyCharNotNL, syntax.OpAnyChar:
		return size{instructions: 1, op: re.Op}
	case syntax.OpCapture:
		s := sizeOf(re.Sub[0])
		s.instructions += 2
		s.op = re.Op
		return s
	case syntax.OpStar, syntax.OpPlus, syntax.OpQuest:
		return repeated(re.Op, re.Flags&syntax.NonGreedy != 0, sizeOf(re.Sub[0]))
	case syntax.OpRepeat:
		return counted(re)
	case syntax.OpConcat:
		parts := make([]size, 0, len(re.Sub))
		for _, sub := range re.Sub {
			parts = append(parts, sizeOf(sub))
		}
		return concat(parts...)
	case syntax.OpAlternate:
		return alternate(re)
	}
	// The empty text, and what stands between characters.
	return size{instructions: 1, nullable: true, op: re.Op}
}

func concat(parts ...size) size {
	all := size{nullable: true, op: syntax.OpConcat}
	if len(parts) == 0 {
		all.instructions = 1
	}
	for _, s := range parts {
		all.instructions += s.instructions
		all.classes += s.classes
		all.never = all.never || s.never
		all.nullable = all.nullable && s.nullable
	}
	all.nullable = all.nullable && !all.never
	return all
}

func alternate(re *syntax.Regexp) size {
	all := size{never: true, op: re.Op}
	for _, sub := range re.Sub {
		s := sizeOf(sub)
		all.instructions += s.instructions
		all.classes += s.classes
		if !all.never && !s.never {
			all.instructions++
		}
		all.never = all.never && s.never
		all.nullable = all.nullable || s.nullable
	}
	return all
}

// repeated is a part with a star, a plus or a question mark.
func repeated(op syntax.Op, lazy bool, s size) size {
	if s.op == syntax.OpEmptyMatch || s.op == op && s.lazy == lazy {
		return s
	}
	out := size{instructions: s.instructions + 1, classes: s.classes, nullable: true, op: op, lazy: lazy}
	switch {
	case op == syntax.OpPlus:
		out.nullable, out.never = s.nullable, s.never
	case op == syntax.OpStar && s.nullable:
		out.instructions++ // (x+)?
	}
	return out
}

// counted is x{n,m}, written out as x, n times, and (x(x)?)?; without m the last of the n has a plus.
func counted(re *syntax.Regexp) size {
	lazy := re.Flags&syntax.NonGreedy != 0
	if re.Min == 0 && re.Max == 0 {
		return size{instructions: 1, nullable: true, op: syntax.OpEmptyMatch}
	}
	s := sizeOf(re.Sub[0])
	switch {
	case re.Max == -1 && re.Min == 0:
		return repeated(syntax.OpStar, lazy, s)
	case re.Max == -1 && re.Min == 1:
		return repeated(syntax.OpPlus, lazy, s)
	case re.Min == 1 && re.Max == 1:
		return s
	}
	var parts []size
	for range re.Min {
		parts = append(parts, s)
	}
	if re.Max == -1 {
		parts[len(parts)-1] = repeated(syntax.OpPlus, lazy, s)
	}
	if re.Max > re.Min {
		rest := repeated(syntax.OpQuest, lazy, s)
		for range re.Max - re.Min - 1 {
			rest = repeated(syntax.OpQuest, lazy, concat(s, rest))
		}
		if re.Min == 0 {
			return rest
		}
		parts = append(parts, rest)
	}
	return concat(parts...)
}
