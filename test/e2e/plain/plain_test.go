// SPDX-License-Identifier: Apache-2.0

package plain

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// TestNetwork proves that the baseline forwards between all pods and that nothing is left of it.
func TestNetwork(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("this test needs root: it makes network namespaces")
	}
	bash, err := exec.LookPath("bash")
	if err != nil {
		t.Fatal("this test needs bash for its /dev/tcp")
	}
	prefix := fmt.Sprintf("plain-%06x-", rand.Uint32()&0xffffff)
	n, err := New(prefix)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for from := range Pods {
		for to, addr := range Pods {
			if from == to {
				continue
			}
			// A closed port answers with a reset at once; no path would be "No route" or a timeout.
			out, err := n.Exec(ctx, from, bash, "-c", fmt.Sprintf("LC_ALL=C timeout 5 bash -c 'echo > /dev/tcp/%s/9' 2>&1 || true", addr))
			if err != nil || !strings.Contains(out, "Connection refused") {
				t.Errorf("%s to %s: %q, %v", from, to, out, err)
			}
		}
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"fabric", "node1", "a"} {
		if _, err := os.Stat("/run/netns/" + prefix + name); err == nil {
			t.Errorf("namespace %s is left behind", name)
		}
	}
}
