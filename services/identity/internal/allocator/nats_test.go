// SPDX-License-Identifier: Apache-2.0

package allocator_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/weirmesh/weir/internal/bus"
	"github.com/weirmesh/weir/internal/status"
	"github.com/weirmesh/weir/services/identity/internal/allocator"
	"github.com/weirmesh/weir/services/identity/internal/store"
)

// storeEnv makes the test binary a NATS server over this folder, so that a test can kill it.
const (
	storeEnv  = "WEIR_TEST_NATS_STORE"
	listenEnv = "WEIR_TEST_NATS_LISTEN"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(storeEnv); dir != "" {
		if err := serveNATS(dir, os.Getenv(listenEnv)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	code := m.Run()
	_ = os.RemoveAll(filepath.Dir(natsBinary.path))
	os.Exit(code)
}

// natsBinary is this test binary once more, without the race detector: it is the brokers that are tested with it, and NATS is five times slower under it.
var natsBinary struct {
	once sync.Once
	path string
	err  error
}

func buildNATS() {
	b := &natsBinary
	dir, err := os.MkdirTemp("", "weir-nats-")
	if err != nil {
		b.err = err
		return
	}
	b.path = filepath.Join(dir, "nats")
	if out, err := exec.Command("go", "test", "-c", "-race=false", "-o", b.path, ".").CombinedOutput(); err != nil {
		b.err = fmt.Errorf("build the NATS server: %w\n%s", err, out)
	}
}

// serveNATS serves until its standard input ends, which it does with the test's process.
func serveNATS(dir, listen string) error {
	server, err := bus.NewServer(bus.ServerConfig{Listen: listen, StoreDir: dir})
	if err != nil {
		return err
	}
	fmt.Println(server.URL())
	_, err = io.Copy(io.Discard, os.Stdin)
	server.Shutdown()
	return err
}

// natsProcess is a NATS server in a process of its own.
type natsProcess struct {
	t      *testing.T
	dir    string
	listen string
	url    string
	cmd    *exec.Cmd
	stdin  io.Closer
}

func startNATS(t *testing.T) *natsProcess {
	t.Helper()
	// A fixed port, so that clients find the server again after it was killed.
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &natsProcess{t: t, dir: t.TempDir(), listen: ln.Addr().String()}
	ln.Close()
	p.start()
	t.Cleanup(p.kill)
	return p
}

func (p *natsProcess) start() {
	p.t.Helper()
	natsBinary.once.Do(buildNATS)
	if natsBinary.err != nil {
		p.t.Fatal(natsBinary.err)
	}
	cmd := exec.Command(natsBinary.path)
	cmd.Env = append(os.Environ(), storeEnv+"="+p.dir, listenEnv+"="+p.listen)
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		p.t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		p.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	p.cmd, p.stdin = cmd, stdin
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		p.t.Fatalf("nats server did not start: %v", err)
	}
	p.url = strings.TrimSpace(line)
}

// kill ends the server as kill -9 does.
func (p *natsProcess) kill() {
	if p.cmd == nil {
		return
	}
	_ = p.cmd.Process.Signal(syscall.SIGKILL) // it may have ended already
	_ = p.cmd.Wait()                          // "signal: killed" is what we want
	_ = p.stdin.Close()
	p.cmd = nil
}

// broker is one broker: an allocator with a connection of its own.
type broker struct {
	*allocator.Allocator
	keys *store.Store
	conn *nats.Conn
	stop context.CancelFunc
	done chan struct{}
}

func testConfig() allocator.Config {
	c := allocator.DefaultConfig()
	c.CollectEvery = time.Hour // tests collect when they mean to
	return c
}

func startBroker(t *testing.T, url string, config allocator.Config) *broker {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	conn, err := bus.Connect(url, nil, log)
	if err != nil {
		t.Fatal(err)
	}
	keys, err := store.New(conn, 1)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	b := &broker{
		Allocator: allocator.New(config, keys, log, status.New("identity", "")),
		keys:      keys, conn: conn, stop: cancel, done: make(chan struct{}),
	}
	go func() {
		defer close(b.done)
		if err := b.Run(ctx); err != nil {
			t.Errorf("broker: %v", err)
		}
	}()
	t.Cleanup(b.kill)
	// List waits until the broker is in step with NATS.
	if _, err := b.List(within(t, 30*time.Second)); err != nil {
		for try := 0; try < 50 && err != nil; try++ { // the bucket is opened in the background
			_, err = b.List(within(t, 30*time.Second))
			if err != nil {
				<-time.After(20 * time.Millisecond)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return b
}

// kill ends a broker where it stands: its connection goes first, so that nothing is tidied up.
func (b *broker) kill() {
	b.conn.Close()
	b.stop()
	<-b.done
}

func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}
