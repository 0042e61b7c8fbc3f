// SPDX-License-Identifier: Apache-2.0

package match

import (
	"fmt"
	"runtime"
	"testing"
	"time"

	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"

	"github.com/weirmesh/weir/services/proxy/internal/pace"
)

func newCompiler() *Compiler { return NewCompiler(pace.New(func() bool { return false })) }

func regex(text string) *matcherv3.RegexMatcher { return &matcherv3.RegexMatcher{Regex: text} }

// Each is judged by what it matches: what is used again must not be taken for another.
func TestUsedAgain(t *testing.T) {
	c := newCompiler()
	for range 3 {
		whole, err := c.Regex(regex("[ab]+c"), "")
		if err != nil || !whole("abc") || whole("xabc") || whole("abcx") {
			t.Fatalf("the whole text: %v", err)
		}
		part, err := c.Substitution(regex("[ab]+c"), "")
		if err != nil || part.ReplaceAllString("xabcx", "-") != "x-x" {
			t.Fatalf("a part: %v", err)
		}
		first, _ := c.find(pattern{"[ab]+c", true})
		second, _ := c.find(pattern{"[ab]+c", false})
		if first == nil || second == nil || first == second || len(c.known) != 2 {
			t.Fatalf("known %v", c.known)
		}
		runtime.KeepAlive(whole)
		runtime.KeepAlive(part)
	}
}

// While something has an expression, it is neither compiled nor measured again.
func TestCompiledOnce(t *testing.T) {
	c := newCompiler()
	const text = "/(a|b|c)*x{1,100}[0-9]+/.*"
	held, err := c.Regex(regex(text), "")
	if err != nil {
		t.Fatal(err)
	}
	before, _ := c.find(pattern{text, true})
	again, err := c.Regex(regex(text), "")
	after, n := c.find(pattern{text, true})
	if err != nil || before != after || !again("/abcxx1/") {
		t.Errorf("compiled again: %v", err)
	}
	if measured, err := c.Instructions(text); err != nil || measured != n || n < 100 {
		t.Errorf("%d instructions, %d when it was compiled; %v", measured, n, err)
	}
	c.known[pattern{text, true}] = known{re: c.known[pattern{text, true}].re, instructions: 7}
	if measured, err := c.Instructions(text); err != nil || measured != 7 {
		t.Errorf("measured again: %d instructions, %v", measured, err)
	}
	runtime.KeepAlive(held)
}

// What nothing has any more is forgotten.
func TestForgotten(t *testing.T) {
	c := newCompiler()
	kept, err := c.Regex(regex("[k]ept+"), "")
	if err != nil {
		t.Fatal(err)
	}
	for i := range 100 {
		if _, err := c.Regex(regex(fmt.Sprintf("[x]+%d", i)), ""); err != nil {
			t.Fatal(err)
		}
	}
	deadline := time.Now().Add(time.Minute)
	for {
		runtime.GC()
		c.mu.Lock()
		n := len(c.known)
		c.mu.Unlock()
		if n == 1 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d are known", n)
		}
		time.Sleep(time.Millisecond) // the pause of a poll
	}
	if re, _ := c.find(pattern{"[k]ept+", true}); re == nil {
		t.Error("what is in use was forgotten")
	}
	runtime.KeepAlive(kept)
}

// What is refused is refused each time, by the field, and not remembered.
func TestRefused(t *testing.T) {
	c := newCompiler()
	for range 2 {
		for text, want := range map[string]string{
			"(": "a.b.regex: error parsing regexp: missing closing ): `(`",
			"(ab){1000}c{1000}.{1000}[xy]{1000}\\d{1000}(ef){1000}g{1000}h{1000}i{1000}j{1000}": "a.b.regex: expression is too large",
		} {
			for _, compile := range []func() error{
				func() error { _, err := c.Regex(regex(text), "a.b"); return err },
				func() error { _, err := c.Substitution(regex(text), "a.b"); return err },
			} {
				if err := compile(); err == nil || err.Error() != want {
					t.Errorf("%.10s: %v, want %s", text, err, want)
				}
			}
		}
	}
	if len(c.known) > 0 {
		t.Errorf("known %v", c.known)
	}
}

// TestPaced: between expressions others are served.
func TestPaced(t *testing.T) {
	now, pauses := time.Unix(1, 0), 0
	c := NewCompiler(pace.NewWith(func() bool { return true },
		func() time.Time { now = now.Add(time.Millisecond); return now }, func(time.Duration) { pauses++ }))
	c.Begin()
	for i := range 10 {
		if _, err := c.Regex(regex(fmt.Sprintf("[x]+%d", i)), ""); err != nil {
			t.Fatal(err)
		}
	}
	if pauses < 9 {
		t.Errorf("%d pauses", pauses)
	}
}
