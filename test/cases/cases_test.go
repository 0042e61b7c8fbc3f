// SPDX-License-Identifier: Apache-2.0

// Package cases plays the cases of testdata on live labs, by the program that people use for that.
package cases

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/weirmesh/weir/test/cases/format"
)

// program is the runner as `make build` left it.
func program(t *testing.T) string {
	t.Helper()
	path, err := filepath.Abs("../../bin/weir-cases")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%s is missing: run make build", path)
	}
	return path
}

func TestCases(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("this test needs root: it makes network namespaces and loads eBPF")
	}
	out, err := exec.Command(program(t), "testdata").CombinedOutput()
	if err != nil {
		t.Fatalf("weir-cases testdata: %v\n%s", err, out)
	}
	t.Logf("%s", out)
}

// TestFailuresAreTold shows that a case whose expectations are wrong fails, each in its own way.
func TestFailuresAreTold(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("this test needs root: it makes network namespaces and loads eBPF")
	}
	out, err := exec.Command(program(t), "testdata/wrong").CombinedOutput()
	if err == nil {
		t.Fatalf("a case with wrong expectations passed:\n%s", out)
	}
	for _, want := range []string{
		"FAIL WRONG ALLOW: wrong expect[0]", "FAIL wrong deny: wrong expect[1]", "FAIL wrong: wrong expect[2]", "FAIL wrong: wrong validation[0]",
		"FAIL wrong: wrong validation[1]", "deny at the other end", "1 wrong allows, 1 wrong denies", "FAIL not readable: unreadable.yaml",
	} {
		if !bytes.Contains(out, []byte(want)) {
			t.Errorf("%q is not in\n%s", want, out)
		}
	}
}

// TestNotYetIsTold shows that a policy which Weir refuses as not enforceable yet is named with its field, and fails nothing.
func TestNotYetIsTold(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("this test needs root: it makes network namespaces and loads eBPF")
	}
	out, err := exec.Command(program(t), "testdata/notyet").CombinedOutput()
	if err != nil {
		t.Fatalf("weir-cases: %v\n%s", err, out)
	}
	for _, want := range []string{"tls: CiliumNetworkPolicy shop/api: spec.ingress[0].toPorts[0].terminatingTLS", "0 of 2 expectations passed, 2 not yet, 0 failed"} {
		if !bytes.Contains(out, []byte(want)) {
			t.Errorf("%q is not in\n%s", want, out)
		}
	}
}

// TestCasesAreReadable needs neither root nor binaries.
func TestCasesAreReadable(t *testing.T) {
	files, err := filepath.Glob("testdata/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no cases: %v", err)
	}
	ids := map[string]bool{}
	cases, err := format.Read("testdata")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range cases {
		if ids[c.ID] {
			t.Errorf("id %s: twice", c.ID)
		}
		ids[c.ID] = true
		if len(c.Expect)+len(c.Validation) == 0 || len(c.Area) == 0 {
			t.Errorf("%s: without expectations, or area", c.ID)
		}
	}
}
