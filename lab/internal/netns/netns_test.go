// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestSurvivesIPNetns does what the first `ip netns add` on a machine does, while a namespace of ours exists.
func TestSurvivesIPNetns(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("this test needs root: it makes a network namespace")
	}
	name := fmt.Sprintf("weirtest-%06x", rand.Uint32()&0xffffff)
	if err := Create(name); err != nil {
		t.Fatal(err)
	}
	// iproute2, ip/ipnetns.c: make it shared; only if it is no mount, mount it over itself first.
	if err := unix.Mount("", Dir, "none", unix.MS_SHARED|unix.MS_REC, ""); err != nil {
		t.Errorf("ip netns would mount %s over itself: %v", Dir, err)
	}
	if err := Do(Path(name), func() error { return nil }); err != nil {
		t.Errorf("enter: %v", err)
	}
	if err := Delete(name); err != nil {
		t.Fatal(err)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(Path(name)); err == nil || strings.Contains(string(mounts), name) {
		t.Error("the namespace is left behind")
	}
}
