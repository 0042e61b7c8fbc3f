// SPDX-License-Identifier: Apache-2.0

package proxy_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"github.com/weirmesh/weir/internal/flags"
	"github.com/weirmesh/weir/services/proxy"
)

// childEnv makes the test's own binary a proxy, so that processes are real ones.
const childEnv = "WEIR_TEST_PROXY_CHILD"

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) == "" {
		os.Exit(m.Run())
	}
	if err := child(); err != nil {
		fmt.Fprintln(os.Stderr, "child:", err)
		os.Exit(1)
	}
}

func child() error {
	config := proxy.DefaultConfig()
	set := pflag.NewFlagSet("child", pflag.ContinueOnError)
	config.AddFlags(set)
	if err := flags.Parse(set, os.Args[1:], func(string) (string, bool) { return "", false }); err != nil {
		return err
	}
	log, err := flags.Logger(os.Stderr, config.LogLevel)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	service, err := proxy.New(config, log)
	if err != nil {
		return err
	}
	return service.Run(ctx)
}

// process is a proxy of its own.
type process struct {
	cmd  *exec.Cmd
	done chan struct{}
	err  error
}

// spawn starts one; it is killed at the end of the test if it still runs.
func (b *bench) spawn(extra ...string) *process {
	b.t.Helper()
	self, err := os.Executable()
	if err != nil {
		b.t.Fatal(err)
	}
	c := b.config
	args := append([]string{
		"--node", c.Node, "--xds", strings.Join(c.XDS, ","), "--tls-cert", c.TLS.Cert, "--tls-key", c.TLS.Key, "--tls-ca", c.TLS.CA,
		"--socket", c.Socket, "--admin-listen", c.AdminListen, "--hot-restart-socket", filepath.Join(b.dir, "hot.sock"),
		"--parent-drain-time", "15s", "--drain-time", "5s",
	}, extra...)
	p := &process{cmd: exec.Command(self, args...), done: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), childEnv+"=1")
	p.cmd.Stderr = testWriter{b.t}
	if err := p.cmd.Start(); err != nil {
		b.t.Fatal(err)
	}
	go func() {
		defer close(p.done)
		p.err = p.cmd.Wait()
	}()
	b.t.Cleanup(func() {
		_ = p.cmd.Process.Kill() // it may have ended
		<-p.done
	})
	return p
}

func (p *process) wait(t testing.TB, what string) {
	t.Helper()
	select {
	case <-p.done:
		if p.err != nil {
			t.Fatalf("%s: %v", what, p.err)
		}
	case <-time.After(patience):
		t.Fatalf("%s: it does not end", what)
	}
}

// load makes requests until it is stopped.
type load struct {
	requests, failures atomic.Uint64
	first              atomic.Pointer[string]
	stop               func()
}

func (l *load) fail(format string, args ...any) {
	l.failures.Add(1)
	text := fmt.Sprintf(format, args...)
	l.first.CompareAndSwap(nil, &text)
}

func startLoad(t testing.TB, addr string) *load {
	t.Helper()
	l := &load{}
	ctx, cancel := context.WithCancel(t.Context())
	var group sync.WaitGroup
	for i := range 6 {
		// Half of them take a new connection each time, which no client would try again.
		transport := &http.Transport{DisableKeepAlives: i%2 == 0}
		client := &http.Client{Transport: transport, Timeout: patience}
		group.Go(func() {
			defer transport.CloseIdleConnections()
			for ctx.Err() == nil {
				r, err := client.Get("http://" + addr + "/")
				if err != nil {
					l.fail("%v", err)
					continue
				}
				body, err := io.ReadAll(r.Body)
				_ = r.Body.Close() // read to its end
				if err != nil || r.StatusCode != http.StatusOK || string(body) != "one" {
					l.fail("%d %q %v", r.StatusCode, body, err)
				}
				l.requests.Add(1)
			}
		})
	}
	l.stop = sync.OnceFunc(func() { cancel(); group.Wait() })
	t.Cleanup(l.stop)
	return l
}

func (l *load) more(t testing.TB, n uint64) {
	t.Helper()
	from := l.requests.Load()
	until(t, "the load goes on", func() bool { return l.requests.Load() >= from+n })
}

// TestHotRestartUnderLoad: three processes one after another; no request fails, a connection that was there goes on, and each old process ends by itself.
func TestHotRestartUnderLoad(t *testing.T) {
	b := newBench(t)
	b.logCluster()
	b.staticCluster("one", named(t, "one"))
	b.staticCluster("echo", echo(t, plain))
	addr, tcpAddr := free(t), free(t)
	b.routes("key", "one")
	b.httpListener("slot-1", addr, "key")
	b.tcpListener("slot-2", tcpAddr, "echo", "")
	current := b.spawn()
	b.answers(addr, "one")
	l := startLoad(t, addr)
	l.more(t, 200)
	for i := range 2 {
		long := dial(t, tcpAddr)
		if _, err := long.Write([]byte("said to the old process, ")); err != nil {
			t.Fatal(err)
		}
		next := b.spawn()
		until(t, "the old process drains", func() bool {
			_, body, err := ask2(b, "/server_info")
			return err == nil && strings.Contains(body, "LIVE") && b.xds.Streams() == i+2 && !listens(filepath.Join(b.dir, "hot.sock"), current)
		})
		l.more(t, 200)
		got, err := say(long, []byte("ended when the new one serves"))
		if err != nil || string(got) != "said to the old process, ended when the new one serves" {
			t.Fatalf("the connection that was there: %q, %v", got, err)
		}
		current.wait(t, "the old process")
		l.more(t, 200)
		current = next
	}
	l.stop()
	if n := l.failures.Load(); n > 0 {
		t.Errorf("%d of %d requests failed, the first: %s", n, l.requests.Load(), *l.first.Load())
	}
	if err := current.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	current.wait(t, "the last process")
}

// listens reports whether the process itself still answers on the hot restart socket.
func listens(path string, p *process) bool {
	conn, err := net.Dial("unix", path)
	if err != nil {
		return true // nobody yet: the new process has not come so far
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return true
	}
	var pid int32
	if err := raw.Control(func(fd uintptr) {
		if cred, credErr := syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED); credErr == nil {
			pid = cred.Pid
		}
	}); err != nil {
		return true
	}
	return int(pid) == p.cmd.Process.Pid
}

// TestNewProcessThatFails: the old one goes on as if nothing had been.
func TestNewProcessThatFails(t *testing.T) {
	b := newBench(t)
	b.logCluster()
	b.staticCluster("one", named(t, "one"))
	addr := free(t)
	b.routes("key", "one")
	b.httpListener("slot-1", addr, "key")
	old := b.spawn()
	b.answers(addr, "one")
	// Nobody answers there, so that it never has a configuration.
	b.config.XDS = []string{free(t)}
	silent := b.spawn("--hot-restart-wait", "300ms")
	select {
	case <-silent.done:
		var exit *exec.ExitError
		if !errors.As(silent.err, &exit) || exit.ExitCode() != 1 {
			t.Fatalf("it ended with %v", silent.err)
		}
	case <-time.After(patience):
		t.Fatal("it does not give up")
	}
	l := startLoad(t, addr)
	l.more(t, 100)
	l.stop()
	if l.failures.Load() > 0 {
		t.Errorf("requests failed: %s", *l.first.Load())
	}
	select {
	case <-old.done:
		t.Error("the old process ended")
	default:
	}
}

// TestTerminationDrains: a request that is under way when the process is told to end is answered, and so is the first one of a connection that was there.
func TestTerminationDrains(t *testing.T) {
	b := newBench(t)
	b.logCluster()
	begun, finish := make(chan struct{}), make(chan struct{})
	slow := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			close(begun)
			<-finish
		}
		_, _ = io.WriteString(w, "one") // a client that has gone fails the test elsewhere
	})}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = slow.Serve(ln) }() // it ends by Close
	t.Cleanup(func() { _ = slow.Close() })
	b.staticCluster("one", ln.Addr().String())
	addr := free(t)
	b.routes("key", "one")
	b.httpListener("slot-1", addr, "key")
	p := b.spawn()
	b.answers(addr, "one")
	early, conn := dial(t, addr), dial(t, addr)
	defer early.Close()
	defer conn.Close()
	if _, err := io.WriteString(conn, "GET /slow HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	<-begun
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	until(t, "the listener is closed", func() bool {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			_ = c.Close() // not yet
		}
		return err != nil
	})
	// One that connected before, and had nothing to say yet.
	if _, err := io.WriteString(early, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if r, err := http.ReadResponse(bufio.NewReader(early), nil); err != nil || r.StatusCode != http.StatusOK {
		t.Fatalf("the first request of a connection: %v, %v", r, err)
	}
	close(finish)
	r, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil || r.StatusCode != http.StatusOK || !r.Close {
		t.Fatalf("response %v, %v; want 200 and the end of the connection", r, err)
	}
	p.wait(t, "the process")
}
