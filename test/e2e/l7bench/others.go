// SPDX-License-Identifier: Apache-2.0

package l7bench

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Shape is what a proxy is to be configured with, or one tenant's part of it.
type Shape struct {
	// Namespace is the tenant; others than Weir know none.
	Namespace string
	// Origin is the server's address.
	Origin string
	// First is the first listener's port on 127.0.0.1; further ones follow.
	First int
	// Listeners; 0 = 1. Routes beside the one for everything, by path prefix.
	Listeners, Routes int
	// Regexes are further routes by expressions that are dear to compile; another Salt makes others of them. Weir only.
	Regexes, Salt int
	// Rule is an expression for paths by which a policy judges every request; empty = no policy. Weir only.
	Rule string
	// Log writes an access log.
	Log bool
	// Reloads prepares HAProxy for being configured anew.
	Reloads bool
}

func (s Shape) address() string { return fmt.Sprintf("127.0.0.1:%d", s.First) }

func (s Shape) ports() []int {
	ports := make([]int, max(s.Listeners, 1))
	for i := range ports {
		ports[i] = s.First + i
	}
	return ports
}

// HAProxy starts HAProxy with one thread.
func HAProxy(ctx context.Context, dir string, cpu int, s Shape) (*Process, error) {
	path, err := writeHAProxy(dir, s)
	if err != nil {
		return nil, err
	}
	mode := "-db" // one process
	if s.Reloads {
		mode = "-W" // a master, of whose workers a reload makes a new one
	}
	return start(ctx, "haproxy", cpu, dir, s.address(), "haproxy", mode, "-f", path)
}

// ReloadHAProxy configures one anew that HAProxy started with Reloads in the same folder, and that was reloaded so many times already.
func ReloadHAProxy(ctx context.Context, p *Process, dir string, s Shape, reloads int) error {
	if err := p.says(ctx, "Loading success", reloads+1, startTime); err != nil {
		return err
	}
	if _, err := writeHAProxy(dir, s); err != nil {
		return err
	}
	// A master that has just said so still forgets signals.
	for deadline := time.Now().Add(startTime); ; {
		if err := p.signal(syscall.SIGUSR2); err != nil {
			return err
		}
		err := p.says(ctx, "Reloading HAProxy", reloads+1, 100*time.Millisecond)
		if err == nil || time.Now().After(deadline) || ctx.Err() != nil {
			return err
		}
	}
}

func writeHAProxy(dir string, s Shape) (path string, err error) {
	var b strings.Builder
	b.WriteString("global\n  nbthread 1\n  maxconn 8000\n")
	if s.Log {
		b.WriteString("  log stdout format raw local0\n")
	}
	b.WriteString("defaults\n  mode http\n  option http-keep-alive\n  http-reuse always\n  timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n")
	if s.Log {
		b.WriteString("  log global\n  option httplog\n")
	}
	b.WriteString("frontend f\n")
	for _, port := range s.ports() {
		fmt.Fprintf(&b, "  bind 127.0.0.1:%d\n", port)
	}
	for i := range s.Routes {
		fmt.Fprintf(&b, "  use_backend b if { path_beg /route/%d/ }\n", i)
	}
	fmt.Fprintf(&b, "  default_backend b\nbackend b\n  server s %s\n", s.Origin)
	path = filepath.Join(dir, "haproxy.cfg")
	if err := os.WriteFile(path, []byte(b.String()), 0o600); err != nil {
		return "", fmt.Errorf("configure haproxy: %w", err)
	}
	return path, nil
}

// Nginx starts nginx with one worker.
func Nginx(ctx context.Context, dir string, cpu int, s Shape) (*Process, error) {
	path, err := writeNginx(dir, s)
	if err != nil {
		return nil, err
	}
	return start(ctx, "nginx", cpu, dir, s.address(), "nginx", "-c", path, "-e", filepath.Join(dir, "nginx-error.log"))
}

// ReloadNginx configures one anew that Nginx started in the same folder.
func ReloadNginx(p *Process, dir string, s Shape) error {
	if _, err := writeNginx(dir, s); err != nil {
		return err
	}
	return p.signal(syscall.SIGHUP)
}

func writeNginx(dir string, s Shape) (path string, err error) {
	var b strings.Builder
	fmt.Fprintf(&b, "daemon off;\nuser root;\nworker_processes 1;\npid %s/nginx.pid;\nerror_log %s/nginx-error.log;\nevents { worker_connections 8000; }\nhttp {\n", dir, dir)
	if s.Log {
		fmt.Fprintf(&b, "  access_log %s/nginx-access.log;\n", dir)
	} else {
		b.WriteString("  access_log off;\n")
	}
	fmt.Fprintf(&b, "  keepalive_requests 100000000;\n  upstream o { server %s; keepalive 256; keepalive_requests 100000000; }\n  server {\n", s.Origin)
	for _, port := range s.ports() {
		fmt.Fprintf(&b, "    listen 127.0.0.1:%d;\n", port)
	}
	const pass = "proxy_pass http://o; proxy_http_version 1.1; proxy_set_header Connection \"\"; proxy_set_header Host $host;"
	for i := range s.Routes {
		fmt.Fprintf(&b, "    location /route/%d/ { %s }\n", i, pass)
	}
	fmt.Fprintf(&b, "    location / { %s }\n  }\n}\n", pass)
	path = filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(path, []byte(b.String()), 0o600); err != nil {
		return "", fmt.Errorf("configure nginx: %w", err)
	}
	return path, nil
}
