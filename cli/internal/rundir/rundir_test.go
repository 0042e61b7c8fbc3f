// SPDX-License-Identifier: Apache-2.0

package rundir

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// tree makes files (folders when they end in a slash) under a new run dir.
func tree(t *testing.T, names ...string) string {
	t.Helper()
	// Short, for the sake of unix socket paths.
	dir, err := os.MkdirTemp("", "weir")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	for _, n := range names {
		path := filepath.Join(dir, n)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(n, "/") {
			err = os.MkdirAll(path, 0o700)
		} else {
			err = os.WriteFile(path, nil, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestFind(t *testing.T) {
	tests := []struct {
		name  string
		files []string
		lab   string
		want  string // lab's name, "cluster", or the error's beginning after "!"
	}{
		{"nothing", nil, "", "!nothing of Weir runs here"},
		{"one lab", []string{"a/lab.sock"}, "", "a"},
		{"one lab and a folder of another kind", []string{"a/lab.sock", "b/notes", "c/"}, "", "a"},
		{"two labs", []string{"a/lab.sock", "b/observer.sock"}, "", "!several labs run (a, b): choose one with --lab or WEIR_LAB"},
		{"named", []string{"a/lab.sock", "b/lab.sock"}, "b", "b"},
		{"named and absent", []string{"a/lab.sock"}, "b", `!no lab "b" runs`},
		{"named outside", []string{"a/lab.sock"}, "../b", `!invalid --lab "../b"`},
		{"cluster", []string{"agent.sock", "a/lab.sock"}, "", "cluster"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p, err := Find(tree(t, tt.files...), tt.lab)
			if want, isError := strings.CutPrefix(tt.want, "!"); isError {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("%v, want %s", err, want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := p.Lab; got != tt.want && (tt.want != "cluster" || got != "") {
				t.Errorf("lab %q, want %q", got, tt.want)
			}
		})
	}
	if _, err := Find(filepath.Join(t.TempDir(), "none"), ""); !errors.Is(err, ErrNone) {
		t.Errorf("run dir that does not exist: %v", err)
	}
}

// Of several folders the one whose lab answers is meant: a killed lab leaves sockets behind.
func TestFindPrefersLive(t *testing.T) {
	dir := tree(t, "dead/lab.sock", "live/")
	ln, err := net.Listen("unix", filepath.Join(dir, "live", "lab.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if p, err := Find(dir, ""); err != nil || p.Lab != "live" {
		t.Errorf("%+v, %v", p, err)
	}
}

func TestParts(t *testing.T) {
	dir := tree(t, "a/lab.sock", "a/observer.sock", "a/relay.sock", "a/relay-2.sock", "a/nats.sock", "a/identity.sock", "a/nodes/n1/agent.sock", "a/nodes/n2/", "a/nodes/notes")
	p, err := Find(dir, "a")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, s := range p.Parts() {
		name := s.Name()
		if s.Missing {
			name += "!"
		}
		got = append(got, name)
	}
	if want := "policy! identity xds! relay relay-2 observer nats agent/n1 agent/n2! dns/n1! dns/n2! proxy/n1! proxy/n2!"; strings.Join(got, " ") != want {
		t.Errorf("got  %s\nwant %s", strings.Join(got, " "), want)
	}

	p, err = Find(tree(t, "agent.sock"), "")
	if err != nil {
		t.Fatal(err)
	}
	if parts := p.Parts(); len(parts) != 3 || parts[0].Name() != "agent" || parts[0].Missing {
		t.Errorf("cluster: %+v", parts)
	}
}
