// SPDX-License-Identifier: Apache-2.0

package healthport

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"
)

func TestPorts(t *testing.T) {
	s := New(slog.New(slog.DiscardHandler))
	defer s.Close()
	addresses := map[string]string{}
	fail := true
	s.listen = func(network, address string) (net.Listener, error) {
		if address == ":30003" && fail {
			return nil, errors.New("taken")
		}
		ln, err := net.Listen(network, "127.0.0.1:0")
		if err == nil {
			addresses[address] = ln.Addr().String()
		}
		return ln, err
	}
	get := func(port string) (int, string) {
		t.Helper()
		r, err := http.Get("http://" + addresses[port] + "/")
		if err != nil {
			return 0, err.Error()
		}
		defer r.Body.Close()
		b, err := io.ReadAll(r.Body)
		if err != nil {
			t.Fatal(err)
		}
		return r.StatusCode, strings.TrimSpace(string(b)) + r.Header.Get("X-Load-Balancing-Endpoint-Weight")
	}
	web := Service{"default", "web", 2}
	err := s.Set(map[uint16]Service{30001: web, 30002: {"default", "idle", 0}, 30003: web})
	if err == nil || !strings.Contains(err.Error(), "default/web: taken") {
		t.Errorf("a taken port: %v", err)
	}
	if code, body := get(":30001"); code != 200 || body != `{"service":{"namespace":"default","name":"web"},"localEndpoints":2,"serviceProxyHealthy":true}2` {
		t.Errorf("%d %s", code, body)
	}
	if code, body := get(":30002"); code != 503 || !json.Valid([]byte(strings.TrimSuffix(body, "0"))) {
		t.Errorf("%d %s", code, body)
	}
	fail, web.LocalEndpoints = false, 0
	if err := s.Set(map[uint16]Service{30001: web, 30003: web}); err != nil {
		t.Error(err)
	}
	for port, want := range map[string]int{":30001": 503, ":30002": 0, ":30003": 503} {
		if code, body := get(port); code != want {
			t.Errorf("%s: %d %s, want %d", port, code, body, want)
		}
	}
	s.Close()
	if err := s.Set(map[uint16]Service{30001: web}); err != nil || len(s.ports) != 0 {
		t.Errorf("after Close: %v, %s", err, fmt.Sprint(s.ports))
	}
}
