// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc"

	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
)

func TestCleanupLab(t *testing.T) {
	m := newMesh(t)
	out, errOut, code := m.run(t, "cleanup", "--node", "n2")
	want := `On n2:
  - stop the agent (start it again with ` + "`weir lab part start --name l agent/n2`" + `)
  - route to each pod, and to the pods of other nodes, by plain routes
  - detach all of Weir's programs, and remove its maps (/sys/fs/bpf/weir/l/n2)
  - remove Weir's links, and what the agent remembers of policies and services
  - from then on: NO POLICY, no services, no masquerading, no flows, until an agent runs again
`
	if code != 1 || out != want || errOut != "nothing was done: repeat it with --yes\n" || len(m.lab.stopped)+len(m.started) != 0 {
		t.Errorf("%d %s\n%swant\n%s, stopped %q, started %q", code, errOut, out, want, m.lab.stopped, m.started)
	}

	m.output = "done: pods have plain routing.\n"
	out = m.must(t, "cleanup", "--yes", "--", "--uplink", "eth7")
	run := filepath.Join(m.env["WEIR_RUN_DIR"], "l", "nodes")
	if got, want := strings.Join(m.started, "\n"), `/bin/weir-lab exec --name l node/n1 -- /bin/weir-agent cleanup --socket `+run+`/n1/agent.sock --state-dir /var/lib/weir/l/nodes/n1 --bpffs /sys/fs/bpf/weir/l/n1 --uplink eth0 --uplink eth7
/bin/weir-lab exec --name l node/n2 -- /bin/weir-agent cleanup --socket `+run+`/n2/agent.sock --state-dir /var/lib/weir/l/nodes/n2 --bpffs /sys/fs/bpf/weir/l/n2 --uplink eth0 --uplink eth7`; got != want {
		t.Errorf("started\n%s\nwant\n%s", got, want)
	}
	if got := strings.Join(m.lab.stopped, " "); got != "agent/n1 agent/n2" {
		t.Errorf("stopped %s", got)
	}
	if !strings.HasSuffix(out, "\nn1:\ndone: pods have plain routing.\n\nn2:\ndone: pods have plain routing.\n") {
		t.Errorf("%s", out)
	}

	// One node that fails does not keep the others.
	m.started, m.startFails = nil, "node/n1"
	_, errOut, code = m.run(t, "cleanup", "--yes")
	if code != 1 || errOut != "n1: exit status 1\nthe cleanup of n1 failed; it may be repeated\n" || len(m.started) != 2 {
		t.Errorf("%d %s %q", code, errOut, m.started)
	}
	m.fails(t, `no node "n9"; there are: n1, n2`, "cleanup", "--node", "n9", "--yes")
	m.fails(t, "weir cleanup takes no argument, got \"now\": see `weir cleanup --help`", "cleanup", "now")
	// --yes is typed, never a standing setting.
	m.env["WEIR_YES"] = "true"
	if _, errOut, code := m.run(t, "cleanup"); code != 1 || errOut != "nothing was done: repeat it with --yes\n" {
		t.Errorf("%d %s", code, errOut)
	}
}

func TestCleanupNode(t *testing.T) {
	dir := shortDir(t)
	c := &command{env: map[string]string{"WEIR_RUN_DIR": dir}}
	socket := filepath.Join(dir, "agent.sock")
	stop := serveSocket(t, socket, func(s *grpc.Server) { agentv1.RegisterAgentServiceServer(s, &policyAgent{}) })
	c.fails(t, "an agent runs on "+socket+": stop it first, and see to it that it is not started again", "cleanup", "--yes")
	stop()
	c.fails(t, "--node is for labs: on a node of a cluster the cleanup is of that node alone", "cleanup", "--node", "n1")
	// Whether the agent's socket was left behind or not.
	for _, left := range []bool{false, true} {
		if left {
			if err := os.WriteFile(socket, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		c.started = nil
		out := c.must(t, "cleanup", "--yes", "--", "--uplink", "ens5")
		if want := "/bin/weir-agent cleanup --socket " + socket + " --uplink ens5"; strings.Join(c.started, "") != want || !strings.Contains(out, "  - run "+want+"\n") {
			t.Errorf("started %q\n%s", c.started, out)
		}
	}
}
