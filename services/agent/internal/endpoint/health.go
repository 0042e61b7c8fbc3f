// SPDX-License-Identifier: Apache-2.0

package endpoint

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"time"

	"github.com/weirmesh/weir/services/agent/internal/address"
	"github.com/weirmesh/weir/services/agent/internal/desired"
	"github.com/weirmesh/weir/services/agent/internal/netdev"
)

// The node's health endpoint: an address of the pod CIDR that answers ping, and HTTP GET /healthz, as long as the agent lives. Its way is
// that of a pod, so that whoever reaches it knows that pods of the node can be reached.
const (
	// HealthUID stands for the health endpoint in a registration.
	HealthUID = "health"
	// HealthPort is where it serves HTTP.
	HealthPort = 4240

	identityHealth  = 4
	healthContainer = "weir-health"
)

// RunHealth makes the health endpoint and serves it until ctx ends. Its namespace ends with the process: a dead agent's node is not healthy.
func (m *Manager) RunHealth(ctx context.Context) error {
	node, err := m.cfg.Store.WaitNode(ctx, m.cfg.Node)
	if err != nil {
		return nil // the agent ends
	}
	if err := m.cfg.Policies.Wait(ctx, HealthUID); err != nil {
		return nil // the agent ends
	}
	ns, err := netdev.NewNamespace()
	if err != nil {
		return err
	}
	defer ns.Close()
	added, err := m.addHealth(ctx, ns, node)
	if err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return fmt.Errorf("health endpoint: %w", err)
	}
	var listeners []net.Listener
	err = ns.Do(func() error {
		for _, a := range added.Addresses {
			ln, err := net.Listen("tcp", net.JoinHostPort(a.String(), strconv.Itoa(HealthPort)))
			if err != nil {
				return err
			}
			listeners = append(listeners, ln)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("health endpoint: %w", err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: 10 * time.Second}
	done := make(chan error, len(listeners))
	for _, ln := range listeners {
		go func() { done <- server.Serve(ln) }()
	}
	<-ctx.Done()
	err = server.Close()
	for range listeners {
		if e := <-done; !errors.Is(e, http.ErrServerClosed) {
			err = errors.Join(err, e)
		}
	}
	return err
}

// addHealth plugs the namespace in, at the address of the last agent's health endpoint if that is still free.
func (m *Manager) addHealth(ctx context.Context, ns *netdev.Namespace, node *desired.Node) (*Added, error) {
	r := AddRequest{ContainerID: healthContainer, IfName: "eth0", Netns: "of the agent"}
	k := key{r.ContainerID, r.IfName}
	if err := m.begin(ctx, k); err != nil {
		return nil, err
	}
	defer m.end(k)
	pod := &desired.Pod{UID: HealthUID, Identity: identityHealth, Addresses: m.health}
	added, err := m.plug(ctx, k, ns, r, pod, node)
	if len(pod.Addresses) > 0 && (errors.Is(err, address.ErrTaken) || errors.Is(err, address.ErrOutside)) {
		pod.Addresses = nil
		added, err = m.plug(ctx, k, ns, r, pod, node)
	}
	return added, err
}
