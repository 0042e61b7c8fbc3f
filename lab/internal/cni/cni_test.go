// SPDX-License-Identifier: Apache-2.0

package cni_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/lab/internal/cni"
	"github.com/weirmesh/weir/lab/internal/launch"
)

// TestMain lets the test binary stand in for weir-lab.
func TestMain(m *testing.M) {
	launch.Intercept()
	os.Exit(m.Run())
}

// plugin is a shell script in the place of the real one. It leaves what it was given in the folder.
func plugin(t *testing.T, answer string) (cni.Plugin, string) {
	t.Helper()
	dir := t.TempDir()
	path := filepath.Join(dir, "weir-cni")
	script := "#!/bin/sh\nenv | grep ^CNI_ | sort > " + dir + "/env\ncat > " + dir + "/stdin\n" + answer
	if err := os.WriteFile(path, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return cni.Plugin{Self: self, Path: path, Socket: "/run/agent.sock"}, dir
}

var pod = cni.Pod{ContainerID: "c1", Netns: "/run/netns/x", Namespace: "shop", Name: "web", UID: "u1"}

func TestAdd(t *testing.T) {
	p, dir := plugin(t, `echo '{"cniVersion":"1.1.0","ips":[{"address":"10.244.1.5/32"},{"address":"fd00::5/128"}]}'`)
	addresses, err := p.Add(t.Context(), pod)
	if err != nil || fmt.Sprint(addresses) != "[10.244.1.5 fd00::5]" {
		t.Errorf("%v, %v", addresses, err)
	}
	for name, want := range map[string]string{
		"env": "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID=c1;K8S_POD_UID=u1\n" +
			"CNI_COMMAND=ADD\nCNI_CONTAINERID=c1\nCNI_IFNAME=eth0\nCNI_NETNS=/run/netns/x\nCNI_PATH=" + dir + "\n",
		"stdin": `{"cniVersion":"1.1.0","name":"weir","socket":"/run/agent.sock","type":"weir-cni"}`,
	} {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != want {
			t.Errorf("%s: %v\n%s\nwant\n%s", name, err, got, want)
		}
	}
}

func TestFaults(t *testing.T) {
	for _, tt := range []struct{ name, answer, want string }{
		{"the plugin says why", `echo '{"cniVersion":"1.1.0","code":11,"msg":"try again","details":"no identity"}'; exit 1`, "cni error 11: try again; no identity"},
		{"it does not", "echo oops >&2; exit 3", "cni ADD: exit status 3: oops"},
		{"no JSON", "echo hello", "cni ADD: answer is not JSON"},
		{"no address", "echo '{}'", "cni ADD: answer has no address: {}"},
		{"a wrong address", `echo '{"ips":[{"address":"10.0.0.1"}]}'`, "cni ADD: answer: ips[0].address"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p, _ := plugin(t, tt.answer)
			if _, err := p.Add(t.Context(), pod); err == nil || !strings.HasPrefix(err.Error(), tt.want) {
				t.Errorf("got %v, want %s", err, tt.want)
			}
		})
	}
	p, _ := plugin(t, `echo '{"code":11,"msg":"m"}'; exit 1`)
	var said *cni.Error
	if err := p.Delete(t.Context(), pod); !errors.As(err, &said) || said.Code != 11 {
		t.Errorf("DEL: %v", err)
	}
}

// TestCancel: a plugin that hangs ends with the context.
func TestCancel(t *testing.T) {
	p, dir := plugin(t, "exec sleep 1000")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- p.Delete(ctx, pod) }()
	deadline := time.Now().Add(20 * time.Second)
	for {
		if _, err := os.Stat(filepath.Join(dir, "stdin")); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the plugin was never started")
		}
		time.Sleep(5 * time.Millisecond)
	}
	cancel()
	select {
	case err := <-done:
		if err == nil {
			t.Error("no error")
		}
	case <-time.After(20 * time.Second):
		t.Fatal("it still runs")
	}
}

func FuzzParseResult(f *testing.F) {
	f.Add([]byte(`{"cniVersion":"1.1.0","ips":[{"address":"10.244.1.5/32"}]}`))
	f.Add([]byte(`{"ips":[{"address":5}]}`))
	f.Add([]byte(`[]`))
	f.Fuzz(func(t *testing.T, data []byte) {
		addresses, err := cni.ParseResult(data)
		if (err == nil) != (len(addresses) > 0) {
			t.Fatalf("%v, %v", addresses, err)
		}
	})
}
