// SPDX-License-Identifier: Apache-2.0

package flow

import (
	"net/netip"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
)

// Peer is the owner of an address.
type Peer struct {
	// EndpointID is the endpoint's number when it is on this node, else 0.
	EndpointID   uint32
	Identity     uint32
	Namespace    string
	Pod          string
	WorkloadName string
	WorkloadKind string
}

// ServiceName names a Kubernetes service.
type ServiceName struct{ Namespace, Name string }

// Frontend is an address that services are reached at.
type Frontend struct {
	Addr  netip.Addr
	Port  uint16
	Proto uint8
}

// departedFor is how long an address's last owner is remembered, so that last flows name it: final flows come minutes after a pod is gone.
const departedFor = 10 * time.Minute

// maxDeparted bounds how many addresses and numbers have such a memory, maxOwners the last owners of one address: a fixed one may
// go from pod to pod quickly.
const (
	maxDeparted = 1 << 14
	maxOwners   = 8
)

// maxCached bounds the cache of encoded ends; peers outside of the cluster have any number of addresses.
const maxCached = 1 << 15

// Directory knows who has which address, what identities and services are called, and keeps the encoded form. Safe for concurrent use.
type Directory struct {
	cluster string
	now     func() time.Time

	mu         sync.Mutex
	peers      map[netip.Addr]Peer
	departed   map[netip.Addr][]departed // oldest first
	identities map[uint32][]string
	// gone are the labels of numbers that nobody has any more, for last flows. A number rests for longer than we remember it, so that they
	// never stand for another set.
	gone       map[uint32]goneIdentity
	services   map[uint32]ServiceName
	frontends  map[Frontend]ServiceName
	vips       map[netip.Addr]ServiceName
	interfaces map[uint32]string

	ends           map[[16]byte]*half
	encodedService map[ServiceName][]byte
	encodedLink    map[uint32][]byte
	rules          map[uint32]*encodedRules
	names          names
	namesLooked    time.Time
}

type goneIdentity struct {
	labels []string
	at     time.Time
}

type departed struct {
	peer Peer
	at   time.Time
}

// half is one end of a flow, encoded: what depends on the address and the identity alone.
type half struct {
	identity  uint32
	endpoint  []byte // flow.Endpoint
	text      string // of the address
	namespace string
	names     []string // that DNS gave the address
}

// NewDirectory makes an empty directory of a cluster.
func NewDirectory(cluster string, now func() time.Time) *Directory {
	d := &Directory{
		cluster: cluster, now: now,
		peers: map[netip.Addr]Peer{}, departed: map[netip.Addr][]departed{},
		identities: map[uint32][]string{}, gone: map[uint32]goneIdentity{}, services: map[uint32]ServiceName{},
		frontends: map[Frontend]ServiceName{}, vips: map[netip.Addr]ServiceName{}, interfaces: map[uint32]string{},
		ends: map[[16]byte]*half{}, encodedService: map[ServiceName][]byte{}, encodedLink: map[uint32][]byte{},
		rules: map[uint32]*encodedRules{}, names: names{},
	}
	for number, name := range reservedLabels {
		d.identities[number] = []string{"reserved:" + name}
	}
	return d
}

// reservedLabels are the identities of the specification.
var reservedLabels = map[uint32]string{
	1: "host", 2: "world", 3: "unmanaged", 4: "health", 5: "init", 6: "remote-node", 7: "kube-apiserver", 8: "ingress",
	9: "world-ipv4", 10: "world-ipv6",
}

// SetPeer says who has an address.
func (d *Directory) SetPeer(a netip.Addr, p Peer) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if old, ok := d.peers[a]; ok && old != p && old.Pod != p.Pod {
		d.departLocked(a, old)
	}
	d.peers[a] = p
	delete(d.ends, a.As16())
}

// RemovePeer says that nobody has the address any more. Flows that come late still find the last owner for a while.
func (d *Directory) RemovePeer(a netip.Addr) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if p, ok := d.peers[a]; ok {
		d.departLocked(a, p)
		delete(d.peers, a)
		delete(d.ends, a.As16())
	}
}

func (d *Directory) departLocked(a netip.Addr, p Peer) {
	old, ok := d.departed[a]
	if !ok && len(d.departed) >= maxDeparted {
		return
	}
	if len(old) >= maxOwners {
		old = slices.Delete(old, 0, 1)
	}
	d.departed[a] = append(old, departed{p, d.now()})
}

// Expire forgets last owners, and numbers that nobody has, when their time is over. Call it now and then.
func (d *Directory) Expire() {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := d.now()
	for a, old := range d.departed {
		left := slices.DeleteFunc(old, func(o departed) bool { return now.Sub(o.at) > departedFor })
		if len(left) == len(old) {
			continue
		}
		if d.departed[a] = left; len(left) == 0 {
			delete(d.departed, a)
		}
		delete(d.ends, a.As16())
	}
	for number, old := range d.gone {
		if now.Sub(old.at) > departedFor {
			delete(d.gone, number)
			clear(d.ends)
		}
	}
	if now.Sub(d.namesLooked) < expireNames {
		return
	}
	d.namesLooked = now
	for _, a := range d.names.expire(now) {
		delete(d.ends, a.As16())
	}
}

// SetIdentity says which labels a number stands for: `source:key=value`.
func (d *Directory) SetIdentity(number uint32, labels []string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if slices.Equal(d.identities[number], labels) {
		return
	}
	labels = slices.Sorted(slices.Values(labels))
	d.identities[number] = labels
	delete(d.gone, number)
	clear(d.ends)
}

// Identities lists all identities known, by number.
func (d *Directory) Identities() map[uint32][]string {
	d.mu.Lock()
	defer d.mu.Unlock()
	all := make(map[uint32][]string, len(d.identities))
	for n, l := range d.identities {
		all[n] = l
	}
	return all
}

// Labels returns the labels of an identity; nil = not known.
func (d *Directory) Labels(number uint32) []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.identities[number]
}

// RemoveIdentity says that nobody has a number any more. Flows that come late still find its labels for a while.
func (d *Directory) RemoveIdentity(number uint32) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if labels, ok := d.identities[number]; ok && len(d.gone) < maxDeparted {
		d.gone[number] = goneIdentity{labels, d.now()}
	}
	delete(d.identities, number)
	clear(d.ends)
}

// SetService names a service by its number and its frontend.
func (d *Directory) SetService(id uint32, f Frontend, name ServiceName) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.services[id] = name
	d.frontends[f] = name
	if !f.Addr.IsUnspecified() { // a node port
		d.vips[f.Addr] = name
	}
}

// RemoveService forgets a frontend. Its number stays known, for connections that outlive it.
func (d *Directory) RemoveService(f Frontend) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.frontends, f)
	delete(d.vips, f.Addr)
	for other, name := range d.frontends {
		if other.Addr == f.Addr {
			d.vips[f.Addr] = name
		}
	}
}

// SetInterface names an interface of this node.
func (d *Directory) SetInterface(index uint32, name string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.interfaces[index] = name
	delete(d.encodedLink, index)
}

// The methods below are for the encoder, which holds mu.

func (d *Directory) end(addr [16]byte, identity uint32) *half {
	h, ok := d.ends[addr]
	if ok && h.identity == identity {
		return h
	}
	return d.buildEnd(addr, identity)
}

func (d *Directory) buildEnd(addr [16]byte, identity uint32) *half {
	a := addrOf(addr)
	p, known := d.peers[a]
	if known && identity != 0 && p.Identity != identity {
		known = false
	}
	for _, old := range slices.Backward(d.departed[a]) {
		if !known && (identity == 0 || old.peer.Identity == identity) {
			p, known = old.peer, true
		}
	}
	if !known {
		p = Peer{Identity: identity}
	}
	if identity != 0 {
		p.Identity = identity
	}
	labels, ok := d.identities[p.Identity]
	if !ok {
		labels = d.gone[p.Identity].labels
	}
	h := &half{identity: identity, text: a.String(), namespace: p.Namespace, names: d.names.of(a, d.now()), endpoint: encodeEndpoint(&p, d.clusterOf(&p), labels)}
	if len(d.ends) >= maxCached {
		clear(d.ends)
	}
	d.ends[addr] = h
	return h
}

// clusterOf: what is not of the cluster has no cluster name.
func (d *Directory) clusterOf(p *Peer) string {
	switch {
	case p.Identity == 0, p.Identity == 2, p.Identity == 9, p.Identity == 10, p.Identity>>24 == 1: // the last are prefixes
		return ""
	}
	return d.cluster
}

func encodeEndpoint(p *Peer, cluster string, labels []string) []byte {
	var b []byte
	b = appendVarintField(b, 1<<3, uint64(p.EndpointID))
	b = appendVarintField(b, 2<<3, uint64(p.Identity))
	b = appendStringField(b, 3<<3|2, p.Namespace)
	for _, l := range labels {
		b = appendBytesField(b, 4<<3|2, []byte(l))
	}
	b = appendStringField(b, 5<<3|2, p.Pod)
	if p.WorkloadName != "" || p.WorkloadKind != "" {
		var w []byte
		w = appendStringField(w, 1<<3|2, p.WorkloadName)
		w = appendStringField(w, 2<<3|2, p.WorkloadKind)
		b = appendBytesField(b, 6<<3|2, w)
	}
	return appendStringField(b, 7<<3|2, cluster)
}

// service returns the encoded flow.Service of a number, or else of a frontend; nil = none.
func (d *Directory) service(id uint32, addr [16]byte, port uint16, proto uint8) []byte {
	var name ServiceName
	ok := false
	if id != 0 {
		name, ok = d.services[id]
	}
	if !ok {
		if len(d.vips) == 0 {
			return nil
		}
		a := addrOf(addr)
		if name, ok = d.frontends[Frontend{a, port, proto}]; !ok {
			if name, ok = d.vips[a]; !ok {
				return nil
			}
		}
	}
	b, ok := d.encodedService[name]
	if !ok {
		b = appendStringField(b, 1<<3|2, name.Name)
		b = appendStringField(b, 2<<3|2, name.Namespace)
		if len(d.encodedService) >= maxCached {
			clear(d.encodedService)
		}
		d.encodedService[name] = b
	}
	return b
}

// link returns the encoded flow.NetworkInterface.
func (d *Directory) link(index uint32) []byte {
	b, ok := d.encodedLink[index]
	if !ok {
		b = protowire.AppendVarint([]byte{1 << 3}, uint64(index))
		b = appendStringField(b, 2<<3|2, d.interfaces[index])
		d.encodedLink[index] = b
	}
	return b
}
