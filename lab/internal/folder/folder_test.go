// SPDX-License-Identifier: Apache-2.0

package folder_test

import (
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/weirmesh/weir/lab/internal/cluster"
	"github.com/weirmesh/weir/lab/internal/folder"
)

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func pod(name string) string {
	return fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {name: %s}\nspec: {containers: [{name: a, command: [a]}]}\n---\n", name)
}

// names are the pods that are not ending.
func names(c *cluster.Cluster) string {
	var all []string
	for _, p := range cluster.List[*corev1.Pod](c) {
		if p.DeletionTimestamp == nil {
			all = append(all, p.Name)
		}
	}
	slices.Sort(all)
	return strings.Join(all, " ")
}

func TestFollow(t *testing.T) {
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a.yaml"), filepath.Join(dir, "deep", "b.yml")
	write(t, a, pod("one")+pod("two"))
	write(t, b, pod("three"))
	write(t, filepath.Join(dir, "notes.txt"), "no manifest")
	write(t, filepath.Join(dir, ".hidden.yaml"), "no manifest")
	items, err := folder.Read([]string{dir})
	if err != nil {
		t.Fatal(err)
	}
	c := cluster.New(cluster.Config{
		Nodes:     []cluster.NodeConfig{{Name: "node1"}},
		ServiceV4: netip.MustParsePrefix("10.96.0.0/16"), ServiceV6: netip.MustParsePrefix("fd00:10:96::/112"),
		DNSV4: netip.MustParseAddr("10.96.0.10"), DNSV6: netip.MustParseAddr("fd00:10:96::a"), Now: time.Now,
	})
	if _, err := c.Apply(items); err != nil {
		t.Fatal(err)
	}
	f, err := folder.NewFollower([]string{dir}, items, c, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	uids := map[string]types.UID{}
	for _, step := range []struct {
		name   string
		do     func()
		pods   string
		faults []string
	}{
		{"nothing", func() {}, "one three two", nil},
		{"an object less, one more", func() { write(t, a, pod("two")+pod("four")) }, "four three two", nil},
		{"a broken file", func() { write(t, a, "apiVersion: v1\nkind: Pod\nmetadata: {nam: x}\n") }, "four three two",
			[]string{a + ":3: metadata.nam: unknown field; did you mean name?"}},
		{"a broken file and a good one", func() { write(t, b, pod("five")) }, "five four two", []string{a + ":3: metadata.nam: unknown field; did you mean name?"}},
		{"an object that cannot be", func() { write(t, a, strings.Replace(pod("six"), "spec: {", "spec: {nodeName: node9, ", 1)) }, "five four two",
			[]string{a + ":1: spec.nodeName: node9 is not a node of this lab"}},
		{"mended", func() { write(t, a, pod("two")+pod("four")) }, "five four two", nil},
		{"an object moves from one file to another", func() { write(t, a, pod("two")); write(t, b, pod("five")+pod("four")) }, "five four two", nil},
		{"a file less", func() {
			if err := os.Remove(b); err != nil {
				t.Fatal(err)
			}
		}, "two", nil},
		{"a new file", func() {
			write(t, filepath.Join(dir, "c.json"), `{"apiVersion":"v1","kind":"Pod","metadata":{"name":"seven"},"spec":{"containers":[{"name":"a","command":["a"]}]}}`)
		}, "seven two", nil},
	} {
		step.do()
		f.Look()
		for _, p := range cluster.List[*corev1.Pod](c) {
			if p.DeletionTimestamp != nil {
				c.PodGone(p.UID)
			}
			if before, known := uids[p.Name]; known && before != p.UID {
				t.Errorf("after %s: pod %s is another one", step.name, p.Name)
			}
			uids[p.Name] = p.UID
		}
		if got := names(c); got != step.pods {
			t.Errorf("after %s: pods %s, want %s", step.name, got, step.pods)
		}
		if got := f.Faults(); !slices.Equal(got, step.faults) {
			t.Errorf("after %s: faults %q, want %q", step.name, got, step.faults)
		}
	}
}

func TestReadFaults(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "a.yaml"), "kind: Pod\n")
	write(t, filepath.Join(dir, "b.yaml"), "kind: Job\n")
	_, err := folder.Read([]string{dir, filepath.Join(dir, "a.yaml")})
	if err == nil || strings.Count(err.Error(), "\n") != 1 || !strings.Contains(err.Error(), "a.yaml:1: apiVersion") || !strings.Contains(err.Error(), "b.yaml:1: kind") {
		t.Errorf("got %v, want a fault of each file, once", err)
	}
	if _, err := folder.Read([]string{filepath.Join(dir, "none")}); err == nil {
		t.Error("a folder that does not exist was read")
	}
}
