// SPDX-License-Identifier: Apache-2.0

package match

import (
	"fmt"
	"regexp"
	"regexp/syntax"
	"runtime"
	"sync"
	"weak"

	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"

	"github.com/weirmesh/weir/internal/expression"
	"github.com/weirmesh/weir/services/proxy/internal/fields"
	"github.com/weirmesh/weir/services/proxy/internal/pace"
)

// Compiler compiles what requests are matched with, at a pace that leaves time to serve them. An expression that something in force has is not compiled again;
// what nothing has any more is forgotten, so that the memory is bounded by what configurations may have, and no tenant drives out another's.
//
// It belongs to the goroutine that builds configurations. nil compiles everything anew, without a pause.
type Compiler struct {
	pace *pace.Pace

	mu    sync.Mutex // forgetting has a goroutine of its own
	known map[pattern]known
}

// pattern is an expression, and whether it must match the whole text.
type pattern struct {
	text  string
	whole bool
}

// known is an expression that was compiled; re is nil when nothing has it any more.
type known struct {
	re           weak.Pointer[regexp.Regexp]
	instructions int
}

// NewCompiler makes a compiler that remembers nothing yet.
func NewCompiler(p *pace.Pace) *Compiler { return &Compiler{pace: p, known: map[pattern]known{}} }

// Begin begins the work after a rest.
func (c *Compiler) Begin() {
	if c != nil {
		c.pace.Begin()
	}
}

// Step is called between steps of the work; it may pause.
func (c *Compiler) Step() {
	if c != nil {
		c.pace.Step()
	}
}

// Instructions is expression.Instructions.
func (c *Compiler) Instructions(text string) (int, error) {
	c.Step()
	for _, whole := range []bool{true, false} {
		if _, n := c.find(pattern{text, whole}); n > 0 {
			return n, nil
		}
	}
	return expression.Instructions(text)
}

// find returns what was compiled and is in use, and its instructions; 0 = none.
func (c *Compiler) find(p pattern) (*regexp.Regexp, int) {
	if c == nil {
		return nil, 0
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	k := c.known[p]
	if re := k.re.Value(); re != nil {
		return re, k.instructions
	}
	return nil, 0
}

// compile compiles an expression of that many instructions.
func (c *Compiler) compile(p pattern, instructions int) (*regexp.Regexp, error) {
	c.Step()
	text := p.text
	if p.whole {
		text = `\A(?:` + text + `)\z`
	}
	re, err := regexp.Compile(text)
	if err != nil || c == nil {
		return re, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.known[p] = known{re: weak.Make(re), instructions: instructions}
	runtime.AddCleanup(re, c.forget, p)
	return re, nil
}

// forget: the expression may have been compiled anew meanwhile.
func (c *Compiler) forget(p pattern) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.known[p].re.Value() == nil {
		delete(c.known, p)
	}
}

// maxProgram bounds the instructions of a regular expression: each is visited once a byte of the text at most.
const maxProgram = 10000

// parse checks an expression without compiling it.
func parse(m *matcherv3.RegexMatcher, path string) (tree *syntax.Regexp, instructions int, err error) {
	if tree, err = syntax.Parse(m.GetRegex(), syntax.Perl); err != nil {
		return nil, 0, fmt.Errorf("%s: %w", fields.Join(path, "regex"), err)
	}
	if instructions = expression.Size(tree); instructions > maxProgram {
		return nil, 0, fmt.Errorf("%s: expression is too large", fields.Join(path, "regex"))
	}
	return tree, instructions, nil
}

// Regex compiles an expression that must match the whole text.
func (c *Compiler) Regex(m *matcherv3.RegexMatcher, path string) (String, error) {
	if err := fields.Only(m, path, "regex", "google_re2"); err != nil {
		return nil, err
	}
	p := pattern{text: m.GetRegex(), whole: true}
	if re, n := c.find(p); n > 0 {
		return re.MatchString, nil
	}
	tree, instructions, err := parse(m, path)
	if err != nil {
		return nil, err
	}
	if f := plain(tree); f != nil {
		return f, nil
	}
	re, err := c.compile(p, instructions)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", fields.Join(path, "regex"), err)
	}
	return re.MatchString, nil
}

// Substitution compiles an expression whose matches in a text are to be replaced.
func (c *Compiler) Substitution(m *matcherv3.RegexMatcher, path string) (*regexp.Regexp, error) {
	if err := fields.Only(m, path, "regex", "google_re2"); err != nil {
		return nil, err
	}
	p := pattern{text: m.GetRegex()}
	if re, n := c.find(p); n > 0 {
		return re, nil
	}
	_, instructions, err := parse(m, path)
	if err != nil {
		return nil, err
	}
	re, err := c.compile(p, instructions)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", fields.Join(path, "regex"), err)
	}
	return re, nil
}
