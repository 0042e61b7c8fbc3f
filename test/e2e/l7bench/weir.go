// SPDX-License-Identifier: Apache-2.0

package l7bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"time"

	alsv3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	cachev3 "github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	serverv3 "github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"google.golang.org/grpc"

	"github.com/weirmesh/weir/internal/spiffe"
)

const node = "bench"

// Weir is a weir-proxy and the server that configures it.
type Weir struct {
	*Process
	cache           cachev3.SnapshotCache
	version         int
	dir             string
	server, logging *grpc.Server
	lines           atomic.Uint64
}

// StartWeir starts a weir-proxy with one thread and further flags.
func StartWeir(ctx context.Context, bin, dir string, cpu int, flags []string, shapes ...Shape) (*Weir, error) {
	w := &Weir{cache: cachev3.NewSnapshotCache(true, cachev3.IDHash{}, nil), dir: dir}
	if err := w.Configure(ctx, shapes...); err != nil {
		return nil, err
	}
	files, err := w.serve(ctx)
	if err != nil {
		return nil, err
	}
	args := append([]string{
		"--node", node, "--xds", files.address, "--tls-cert", files.cert, "--tls-key", files.key, "--tls-ca", files.ca,
		"--socket", filepath.Join(dir, "proxy.sock"), "--admin-listen", "127.0.0.1:0", "--access-log", w.logSocket(),
	}, flags...)
	if w.Process, err = start(ctx, "weir-proxy", cpu, dir, shapes[0].address(), filepath.Join(bin, "weir-proxy"), args...); err != nil {
		w.stopServers()
		return nil, err
	}
	return w, nil
}

// Stop ends proxy and servers.
func (w *Weir) Stop() error {
	err := w.Process.Stop()
	w.stopServers()
	return err
}

func (w *Weir) stopServers() {
	w.server.Stop()
	w.logging.Stop()
}

// Lines of the access log that came.
func (w *Weir) Lines() uint64 { return w.lines.Load() }

func (w *Weir) logSocket() string { return filepath.Join(w.dir, "log.sock") }

// Configure changes the proxy's configuration.
func (w *Weir) Configure(ctx context.Context, shapes ...Shape) error {
	w.version++
	snapshot, err := cachev3.NewSnapshot(strconv.Itoa(w.version), resources(shapes, w.logSocket()))
	if err != nil {
		return fmt.Errorf("configure: %w", err)
	}
	return w.cache.SetSnapshot(ctx, node, snapshot)
}

type served struct{ address, cert, key, ca string }

// serve serves configuration by mutual TLS, and takes access logs on a socket.
func (w *Weir) serve(ctx context.Context) (served, error) {
	dir := w.dir
	ca, err := spiffe.NewCA("weir.bench")
	if err != nil {
		return served{}, err
	}
	files := served{cert: filepath.Join(dir, "proxy.crt"), key: filepath.Join(dir, "proxy.key"), ca: filepath.Join(dir, "ca.crt")}
	issue := func(id spiffe.ID, cert, key string) error {
		c, k, err := ca.Issue(id, time.Hour)
		return errors.Join(err, os.WriteFile(cert, c, 0o600), os.WriteFile(key, k, 0o600))
	}
	err = errors.Join(os.WriteFile(files.ca, ca.CertPEM(), 0o600),
		issue(spiffe.ID{TrustDomain: "weir.bench", Service: "proxy", Node: node}, files.cert, files.key),
		issue(spiffe.ID{TrustDomain: "weir.bench", Service: "xds"}, filepath.Join(dir, "xds.crt"), filepath.Join(dir, "xds.key")))
	if err != nil {
		return served{}, err
	}
	source, err := spiffe.Load(spiffe.Files{Cert: filepath.Join(dir, "xds.crt"), Key: filepath.Join(dir, "xds.key"), CA: files.ca})
	if err != nil {
		return served{}, err
	}
	var lc net.ListenConfig
	listener, err := lc.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return served{}, fmt.Errorf("serve configuration: %w", err)
	}
	files.address = listener.Addr().String()
	w.server = grpc.NewServer(grpc.Creds(source.ServerCredentials()), grpc.MaxSendMsgSize(256<<20))
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(w.server, serverv3.NewServer(ctx, w.cache, nil))
	go func() { _ = w.server.Serve(listener) }() // ends with Stop
	logs, err := lc.Listen(ctx, "unix", w.logSocket())
	if err != nil {
		w.server.Stop()
		return served{}, fmt.Errorf("take access logs: %w", err)
	}
	const window = 1 << 20 // as weir-agent has
	w.logging = grpc.NewServer(grpc.InitialWindowSize(window), grpc.InitialConnWindowSize(window))
	alsv3.RegisterAccessLogServiceServer(w.logging, logTaker{&w.lines})
	go func() { _ = w.logging.Serve(logs) }() // ends with Stop
	return files, nil
}

type logTaker struct{ lines *atomic.Uint64 }

// StreamAccessLogs counts.
func (l logTaker) StreamAccessLogs(stream alsv3.AccessLogService_StreamAccessLogsServer) error {
	for {
		m, err := stream.Recv()
		if err != nil {
			return err
		}
		l.lines.Add(uint64(len(m.GetHttpLogs().GetLogEntry())))
	}
}

// Scrape reads the metrics of the proxy whose operator's page is there.
func Scrape(ctx context.Context, admin string) (string, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+admin+"/stats/prometheus", nil)
	if err != nil {
		return "", fmt.Errorf("metrics of %s: %w", admin, err)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return "", fmt.Errorf("metrics of %s: %w", admin, err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		return "", fmt.Errorf("metrics of %s: %w", admin, err)
	}
	return string(text), nil
}
