// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/weirmesh/weir/test/e2e/cluster"
)

// TestDemo runs `make demo` as a user does, for some seconds, and looks for the scenes that it promises.
func TestDemo(t *testing.T) {
	t.Parallel() // with others at the end: it waits more than it works
	name := fmt.Sprintf("d%06x", rand.Uint32()&0xffffff)
	cmd := exec.Command(cluster.Root(t) + "/scripts/demo")
	cmd.Env = append(os.Environ(), "DEMO_SECONDS=20", "DEMO_NAME="+name, "DEMO_LISTEN="+cluster.FreePort(t))
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("make demo: %v\n%s", err, out)
	}
	text := string(out)
	for what, pattern := range map[string]string{
		"a DNS query":                 `\[default/node\d\]: default/client\S*:\d+ \(ID:\d+\) -> kube-system/coredns\S*:53 \(ID:\d+\) \S+ FORWARDED \(UDP\)`,
		"its answer":                  `default/client\S*:\d+ \(ID:\d+\) <- kube-system/coredns\S*:53 \(ID:\d+\) \S+ FORWARDED \(UDP\)`,
		"client to todoui":            `default/client\S*:\d+ \(ID:\d+\) -> default/todoui\S*:8090 \(ID:\d+\) to-endpoint FORWARDED \(TCP Flags: SYN\)`,
		"todoui's answer":             `default/client\S*:\d+ \(ID:\d+\) <- default/todoui\S*:8090 \(ID:\d+\) \S+ FORWARDED \(TCP Flags: SYN, ACK\)`,
		"todoui to todobackend":       `default/todoui\S*:\d+ \(ID:\d+\) -> default/todobackend\S*:8080 \(ID:\d+\) \S+ FORWARDED \(TCP Flags: SYN\)`,
		"data":                        `default/todobackend\S*:8080 \(ID:\d+\) \S+ FORWARDED \(TCP Flags: ACK, PSH\)`,
		"the end":                     `default/todobackend\S*:8080 \(ID:\d+\) \S+ FORWARDED \(TCP Flags: ACK, FIN\)`,
		"service translation, before": `default/client\S* \(ID:\d+\) <?->? default/todoui:8090 \(\S+\) pre-xlate-fwd TRACED \(TCP\)`,
		"service translation, after":  `default/client\S* \(ID:\d+\) <?->? default/todoui\S*:8090 \(ID:\d+\) post-xlate-fwd TRANSLATED \(TCP\)`,
		"a request":                   `default/client\S*:\d+ \(ID:\d+\) -> default/todoui\S*:8090 \(ID:\d+\) http-request FORWARDED \(HTTP/1.1 GET http://todoui:8090/\)`,
		"its response":                `default/client\S*:\d+ \(ID:\d+\) <- default/todoui\S*:8090 \(ID:\d+\) http-response FORWARDED \(HTTP/1.1 200 \d+ms`,
		"a query by name":             `default/todoui\S*:\d+ \(ID:\d+\) -> kube-system/coredns\S*:53 \(ID:\d+\) dns-request proxy FORWARDED \(DNS Query todobackend.default.svc.cluster.local. A\)`,
		"the outside host":            `\(world\S*\) -> default/todoui\S*:8090`,
		"node 1":                      `\[default/node1\]`,
		"node 2":                      `\[default/node2\]`,
		"the second terminal":         `Open a second terminal`,
	} {
		if !regexp.MustCompile(pattern).MatchString(text) {
			t.Errorf("no line shows %s: %s", what, pattern)
		}
	}
	if t.Failed() {
		t.Log(text)
	}
	left, err := os.ReadDir("/run/netns")
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	for _, n := range left {
		if strings.HasPrefix(n.Name(), "weir-"+name) {
			t.Errorf("namespace %s is left behind", n.Name())
		}
	}
}
