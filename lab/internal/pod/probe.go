// SPDX-License-Identifier: Apache-2.0

package pod

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/weirmesh/weir/lab/internal/manifest"
	"github.com/weirmesh/weir/lab/internal/netns"
	"github.com/weirmesh/weir/lab/internal/process"
)

// prober asks one container whether it is ready, from the namespace where a kubelet would be.
type prober struct {
	probe  *corev1.Probe
	ports  []corev1.ContainerPort
	from   string // network namespace
	target netip.Addr
	exec   func(args []string) (*process.Process, error)
}

// A probe's period when the manifest gives none: Kubernetes' own once the container is ready, and short before, since somebody waits. Failures in a row that
// end readiness are Kubernetes' three: a machine that is busy for a second takes no service's last backend away.
const (
	defaultPeriod   = 10 * time.Second
	eagerPeriod     = 100 * time.Millisecond
	defaultFailures = 3
)

func seconds(n int32, otherwise time.Duration) time.Duration {
	if n <= 0 {
		return otherwise
	}
	return time.Duration(n) * time.Second
}

// run reports each change of readiness until ctx ends. The container is not ready before the first success.
func (p *prober) run(ctx context.Context, report func(ready bool, why string)) {
	if !wait(ctx, seconds(p.probe.InitialDelaySeconds, 0)) {
		return
	}
	ready := false
	enough := p.probe.FailureThreshold
	if enough <= 0 {
		enough = defaultFailures
	}
	successes, failures := int32(0), int32(0)
	for {
		attempt, cancel := context.WithTimeout(ctx, seconds(p.probe.TimeoutSeconds, time.Second))
		err := p.once(attempt)
		cancel()
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			successes, failures = successes+1, 0
		} else {
			successes, failures = 0, failures+1
		}
		switch {
		case err == nil && !ready && successes >= max(p.probe.SuccessThreshold, 1):
			ready = true
			report(true, "")
		case err != nil && ready && failures >= enough:
			ready = false
			report(false, "readiness probe failed: "+err.Error())
		case err != nil && !ready:
			report(false, "readiness probe failed: "+err.Error())
		}
		pause := seconds(p.probe.PeriodSeconds, defaultPeriod)
		if !ready && p.probe.PeriodSeconds == 0 {
			pause = eagerPeriod
		}
		if !wait(ctx, pause) {
			return
		}
	}
}

// wait reports whether the time passed before ctx ended.
func wait(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

func (p *prober) once(ctx context.Context) error {
	switch {
	case p.probe.HTTPGet != nil:
		return p.http(ctx, p.probe.HTTPGet)
	case p.probe.TCPSocket != nil:
		number, _ := manifest.PortNumber(p.probe.TCPSocket.Port, p.ports)
		conn, err := p.dial(ctx, p.host(p.probe.TCPSocket.Host), number)
		if err != nil {
			return err
		}
		return conn.Close()
	default:
		return p.command(ctx, p.probe.Exec.Command)
	}
}

func (p *prober) host(given string) string {
	if given != "" {
		return given
	}
	return p.target.String()
}

// dial connects from the prober's namespace. The address is a literal, so that the connection is made on this thread.
func (p *prober) dial(ctx context.Context, host string, port int32) (net.Conn, error) {
	var conn net.Conn
	err := netns.Do(p.from, func() error {
		var err error
		conn, err = (&net.Dialer{}).DialContext(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(int(port))))
		return err
	})
	return conn, err
}

func (p *prober) http(ctx context.Context, get *corev1.HTTPGetAction) error {
	number, _ := manifest.PortNumber(get.Port, p.ports)
	host := p.host(get.Host)
	client := &http.Client{
		Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return p.dial(ctx, host, number) },
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	path := get.Path
	if path == "" {
		path = "/"
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+net.JoinHostPort(host, strconv.Itoa(int(number)))+path, nil)
	if err != nil {
		return err
	}
	request.Header.Set("User-Agent", "weir-lab-probe")
	for _, header := range get.HTTPHeaders {
		request.Header.Set(header.Name, header.Value)
	}
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if _, err := io.Copy(io.Discard, io.LimitReader(response.Body, 10<<10)); err != nil {
		return err
	}
	if response.StatusCode < 200 || response.StatusCode >= 400 {
		return fmt.Errorf("HTTP status %d", response.StatusCode)
	}
	return nil
}

func (p *prober) command(ctx context.Context, args []string) error {
	started, err := p.exec(args)
	if err != nil {
		return err
	}
	select {
	case <-started.Done():
	case <-ctx.Done():
		return fmt.Errorf("%s: no end in time: %w", args[0], started.Stop(0))
	}
	if exit := started.Exit(); exit.Code != 0 {
		return fmt.Errorf("%s: %s", args[0], exit)
	}
	return nil
}
