// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"

	"github.com/weirmesh/weir/bpf/datapath"
	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
	"github.com/weirmesh/weir/internal/server"
	"github.com/weirmesh/weir/internal/status"
	"github.com/weirmesh/weir/services/agent/internal/accesslog"
	"github.com/weirmesh/weir/services/agent/internal/desired"
	"github.com/weirmesh/weir/services/agent/internal/namerules"
	"github.com/weirmesh/weir/services/agent/internal/netdev"
	"github.com/weirmesh/weir/services/agent/internal/policysync"
	"github.com/weirmesh/weir/services/agent/internal/request"
	"github.com/weirmesh/weir/services/agent/internal/slot"
)

// setUpProxies makes what the agent has for the node's proxy and for weir-dns.
func (n *node) setUpProxies() error {
	var err error
	if n.view, err = datapath.OpenView(n.config.BPFFS); err != nil {
		return err
	}
	n.slots, err = slot.New(slot.Config{
		Path: n.path("slots"), Kernel: n.datapath.Slots(), Listening: netdev.ListeningTCP, DNSPort: n.config.DNSPort, ProxyPort: n.config.ProxyAdminPort,
		Report: n.reportSlots, Now: time.Now, Log: n.log,
	})
	if err != nil {
		return err
	}
	n.names = namerules.New(namerules.Config{Record: n.dnsRecord, Lost: n.requests.Lose, Draining: n.draining, Now: time.Now, Log: n.log})
	n.accessLog = accesslog.New(accesslog.Config{
		Slot: n.slots.Get, Rules: func(filter string) []desired.PolicyRule { return n.policies.FilterRules(filter) }, Identity: n.identityOf,
		Put: n.requests.Put, Lost: n.requests.Lose, Malformed: n.requests.Malformed,
		Headers: accesslog.NewHeaders(n.config.L7Headers, n.config.L7RedactHeaders), Query: n.config.L7Query, Shift: n.config.ClockOffset,
		Draining: n.draining, Now: time.Now, Log: n.log,
	})
	return nil
}

// namedPolicies are the policies that weir-dns has written rows of.
func namedPolicies(bpffs string) ([]uint32, error) {
	maps, err := datapath.OpenNames(bpffs)
	if err != nil {
		return nil, err
	}
	rows, err := maps.Policies()
	var policies []uint32
	for _, r := range rows {
		policies = append(policies, r.Policy)
	}
	return policies, errors.Join(err, maps.Close())
}

// reportSlots tells the policy service which slots are in use.
func (n *node) reportSlots(list []slot.Slot) {
	all := make([]policysync.Slot, 0, len(list))
	for i := range list {
		all = append(all, policysync.Slot{Number: list[i].Number, Key: list[i].Key, Port: n.slots.PortOf(&list[i])})
	}
	n.policy.SetSlots(all)
}

// identityOf is who has an address to the kernel.
func (n *node) identityOf(a netip.Addr) uint32 {
	identity, _ := n.view.Peer(a)
	v4, v6 := n.worlds()
	switch identity {
	case datapath.IdentityWorldIPv4:
		return v4
	case datapath.IdentityWorldIPv6:
		return v6
	}
	return identity
}

// dnsRecord takes what weir-dns saw. Flows name addresses by what it resolved.
func (n *node) dnsRecord(record *agentv1.DNSRecord) {
	r, ok := request.OfDNS(record, n.config.ClockOffset)
	if !ok {
		n.requests.Malformed()
		return
	}
	r.ClientIdentity, r.ServerIdentity = n.identityOf(r.Client.Addr()), n.identityOf(r.Server.Addr())
	r.ProxyPort = n.config.DNSPort
	addresses, name, ttl := request.Named(r)
	for _, a := range addresses {
		n.directory.SetName(a, name, ttl)
	}
	n.requests.Put(r)
}

// accessLogServer makes the server of the proxy's access log, on a socket of its own.
func (n *node) accessLogServer() (*server.Server, net.Listener, error) {
	rpc := server.New(server.Config{Name: "access-log", Log: n.log, TLS: n.tls, Authorize: server.Table{
		"/" + accesslogv3.AccessLogService_ServiceDesc.ServiceName + "/": {server.Local},
	}, Options: accesslog.ServerOptions()})
	rpc.SetServing("", true)
	n.accessLog.Register(rpc.GRPC())
	ln, err := server.ListenUnix(n.config.accessLog())
	return rpc, ln, err
}

// slotUsers lists what uses a filter: keys of policies, and services as "service/namespace/name".
func (n *node) slotUsers(key string) []string {
	all := n.policies.FilterUsers(key)
	for _, s := range n.mirror.RouteUsers(key) {
		all = append(all, "service/"+s)
	}
	return all
}

// proxyDetails is what an operator reads of the proxy and weir-dns.
func (n *node) proxyDetails() []status.Detail {
	st, logs, q, dns := n.slots.Stats(), n.accessLog.Stats(), n.requests.Stats(), n.names.Status()
	words := "not there: connections that need it by a rule are dropped, those that are only looked at go straight on"
	rows, err := n.slots.Rows()
	switch {
	case err != nil:
		words = err.Error()
	case n.slots.Proxy():
		missing := len(slices.DeleteFunc(rows, func(r slot.Row) bool { return r.Listening || !r.Since.IsZero() || r.DNS() }))
		words = "listens"
		if missing > 0 {
			words = fmt.Sprintf("listens, but not for %d slots", missing)
		}
	case st.Used == 0:
		words = "not there, and not needed"
	}
	details := []status.Detail{
		{Name: "proxy", Value: words},
		{Name: "slots", Value: fmt.Sprintf("%d of %d in use, %d rest", st.Used, st.Max, st.Resting)},
		{Name: "access log", Value: fmt.Sprintf("%d entries by %d streams; %d requests taken, %d lost before they came, %d lost here, %d malformed",
			logs.Entries, logs.Streams, q.Taken, q.Lost, q.Dropped, q.Malformed)},
	}
	if c, err := n.datapath.Counters(); err == nil && c.Proxy != (datapath.ProxyCounts{}) {
		details = append(details, status.Detail{Name: "redirected", Value: fmt.Sprintf(
			"%d connections; without a listener %d packets dropped, %d connections not seen; %d packets of connections that the proxy lost, %d of such that were reset",
			c.Proxy.Redirected, c.Proxy.NoListener, c.Proxy.NotSeen, c.Proxy.Lost, c.Proxy.Moved)})
	}
	if !dns.Connected {
		return append(details, status.Detail{Name: "weir-dns", Value: "not connected: what it knew holds, new names are denied"})
	}
	words = fmt.Sprintf("connected, %d names, %d addresses, %d records", dns.Names, dns.Addresses, dns.Records)
	if dns.Acked < dns.Revision {
		words += fmt.Sprintf(", behind: revision %d of %d", dns.Acked, dns.Revision)
	}
	if dns.Evicted > 0 {
		words += fmt.Sprintf(", %d addresses fell out of its full cache", dns.Evicted)
	}
	return append(details, status.Detail{Name: "weir-dns", Value: words})
}
