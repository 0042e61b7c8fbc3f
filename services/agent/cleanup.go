// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/weirmesh/weir/bpf/datapath"
	"github.com/weirmesh/weir/services/agent/internal/desired"
	"github.com/weirmesh/weir/services/agent/internal/endpoint"
	"github.com/weirmesh/weir/services/agent/internal/netdev"
	"github.com/weirmesh/weir/services/agent/internal/policysync"
)

// Cleanup takes away what agents made on this node, and leaves its pods with plain routing: no policy, no services, no flows, no masquerading. It goes on
// after a step that fails, tells each step, and may be repeated. It refuses while an agent runs. A new agent takes the pods over again.
func Cleanup(c Config, out io.Writer) error {
	if c.Socket != "" {
		if conn, err := net.DialTimeout("unix", c.Socket, time.Second); err == nil {
			return errors.Join(fmt.Errorf("an agent runs on %s: stop it first", c.Socket), conn.Close())
		}
	}
	var errs []error
	step := func(what string, err error) {
		if err != nil {
			fmt.Fprintf(out, "%s: FAILED: %v\n", what, err)
			errs = append(errs, fmt.Errorf("%s: %w", what, err))
			return
		}
		fmt.Fprintln(out, what)
	}
	uplink, err := netdev.FindUplink(c.Uplink)
	step("find the uplink "+c.Uplink, err)

	// The pods' routes first: they are narrower than those that go, so that there is always one.
	pods, err := endpoint.ReadEndpoints(filepath.Join(c.StateDir, "endpoints"))
	step(fmt.Sprintf("read %d endpoints of the last agent", len(pods)), err)
	for _, e := range pods {
		if _, present := netdev.LinkIndex(e.HostIfName); !present || e.UID == endpoint.HealthUID {
			continue
		}
		step(fmt.Sprintf("route to pod %s/%s (%s) by %s", e.Namespace, e.Name, addressWords(e.Addresses), e.HostIfName), plainPod(e))
	}
	step("detach all programs, and remove all maps, of "+c.BPFFS, removePins(c.BPFFS))
	if err == nil {
		err = remoteRoutes(c, uplink)
	}
	step("route to the pods of other nodes by their addresses", err)
	step("remove the rules and routes of the proxy", netdev.RemoveProxy())
	for _, link := range []string{netdev.HostLink, netdev.OverlayLink} {
		step("remove "+link, netdev.DeleteLink(link))
	}
	for _, file := range []string{"policy-numbers", "policy-pauses", "service-ids", "slots", "flow-end"} {
		err := os.Remove(filepath.Join(c.StateDir, file))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		step("forget "+file, err)
	}
	if len(errs) == 0 {
		fmt.Fprintln(out, "done: pods have plain routing. There is no policy, no service translation and no masquerading until an agent runs again.")
	}
	return errors.Join(errs...)
}

func addressWords(list []netip.Addr) string {
	var words []string
	for _, a := range list {
		words = append(words, a.String())
	}
	return strings.Join(words, ", ")
}

func plainPod(e *endpoint.Endpoint) error {
	wire, err := e.Wire()
	if err != nil {
		return err
	}
	return netdev.AddPlainPod(wire)
}

// removePins removes the folder's content, and the folder unless it is a mount.
func removePins(path string) error {
	if err := datapath.Remove(path); err != nil {
		if _, statErr := os.Stat(filepath.Join(path, "links")); statErr == nil {
			return err
		}
	}
	return nil
}

// remoteRoutes leads to other nodes' pods through the uplink, whatever the routing was.
func remoteRoutes(c Config, uplink netdev.Uplink) error {
	state, _, err := policysync.ReadState(filepath.Join(c.StateDir, "policy-state"))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	nodes := map[string]*desired.Node{}
	for _, u := range state {
		if n, ok := u.Resource.(*desired.Node); ok {
			nodes[n.Name] = n
		}
	}
	var routes []netdev.Route
	lead := func(n *desired.Node, p netip.Prefix) {
		i := slices.IndexFunc(n.Addresses, func(a netip.Addr) bool { return a.Is4() == p.Addr().Is4() })
		own := slices.Contains(n.Addresses, uplink.IPv4) || slices.Contains(n.Addresses, uplink.IPv6)
		if i >= 0 && !own {
			routes = append(routes, netdev.Route{Prefix: p, Via: n.Addresses[i]})
		}
	}
	for _, u := range state {
		switch x := u.Resource.(type) {
		case *desired.Node:
			for _, p := range x.PodCIDRs {
				lead(x, p)
			}
		case *desired.Endpoint:
			n := nodes[x.Node]
			if n == nil || x.HostNetwork {
				continue
			}
			for _, a := range x.Addresses {
				if !slices.ContainsFunc(n.PodCIDRs, func(p netip.Prefix) bool { return p.Contains(a) }) {
					lead(n, netip.PrefixFrom(a, a.BitLen()))
				}
			}
		}
	}
	return netdev.SyncRoutes(uplink, routes)
}
