// SPDX-License-Identifier: Apache-2.0

package ui_test

import (
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/examples/todo/backend"
	"github.com/weirmesh/weir/examples/todo/ui"
)

func TestApp(t *testing.T) {
	store := httptest.NewServer(backend.New().Handler())
	defer store.Close()
	front := httptest.NewServer((&ui.Server{Backend: store.URL, Stress: time.Millisecond, Client: store.Client()}).Handler())
	defer front.Close()
	client := front.Client()
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

	get := func(path string) (int, string) {
		t.Helper()
		resp, err := client.Get(front.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(b)
	}
	resp, err := client.PostForm(front.URL+"/", url.Values{"todo": {"<b>water/fish</b>"}})
	if err != nil || resp.StatusCode != http.StatusSeeOther {
		t.Fatalf("add: %v, %v", resp, err)
	}
	resp.Body.Close()
	for _, tt := range []struct {
		path, want string
		status     int
	}{
		{"/", "<li>measure the river</li>", 200},
		{"/", "<li>&lt;b&gt;water/fish&lt;/b&gt;</li>", 200},
		{"/todos", `"measure the river"`, 200},
		{"/stress/", "", 302},
		{"/nothing", "", 404},
	} {
		status, body := get(tt.path)
		if status != tt.status || !strings.Contains(body, tt.want) {
			t.Errorf("GET %s: %d %q, want %d and %q", tt.path, status, body, tt.status, tt.want)
		}
	}
	store.Close()
	if status, _ := get("/"); status != http.StatusBadGateway {
		t.Errorf("GET / without a backend: %d, want 502", status)
	}
}
