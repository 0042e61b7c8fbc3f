// SPDX-License-Identifier: Apache-2.0

// Package rundir finds the unix sockets of Weir's parts: of a lab under
// /run/weir/<lab>, or of a node of a cluster in /run/weir itself.
package rundir

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// Default is where Weir keeps its sockets.
const Default = "/run/weir"

// maxMessage bounds one message; the list of all policies with their objects is the largest.
const maxMessage = 64 << 20

// Place is a folder with sockets.
type Place struct {
	// Lab is the lab's name; empty = a node of a cluster.
	Lab string
	Dir string
}

// Socket is the socket of one part.
type Socket struct {
	// Part is agent, policy, relay-2, ...; Node is set for agents.
	Part, Node string
	Path       string
	// Missing says that the socket should be there and is not.
	Missing bool
}

// Name tells parts apart: relay-2, agent/node1.
func (s Socket) Name() string {
	if s.Node != "" {
		return s.Part + "/" + s.Node
	}
	return s.Part
}

// Dial makes a client connection over the socket; it connects with the first call. The caller closes it.
func (s Socket) Dial() (*grpc.ClientConn, error) {
	conn, err := grpc.NewClient("unix://"+s.Path, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)))
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", s.Name(), err)
	}
	return conn, nil
}

// ErrNone says that nothing of Weir runs here.
var ErrNone = errors.New("nothing of Weir runs here: start a lab with `weir lab up`")

// Find picks the place: the lab by name, else this machine as a node of a
// cluster, else the only lab that runs.
func Find(runDir, lab string) (Place, error) {
	if lab != "" {
		if strings.ContainsAny(lab, "/") || lab == "." || lab == ".." {
			return Place{}, fmt.Errorf("invalid --lab %q", lab)
		}
		dir := filepath.Join(runDir, lab)
		if _, err := os.Stat(dir); err != nil {
			return Place{}, fmt.Errorf("no lab %q runs: %w", lab, err)
		}
		return Place{Lab: lab, Dir: dir}, nil
	}
	if _, err := os.Stat(filepath.Join(runDir, "agent.sock")); err == nil {
		return Place{Dir: runDir}, nil
	}
	labs, err := labsIn(runDir)
	if err != nil {
		return Place{}, err
	}
	// A lab that was killed leaves its folder behind until the next `up` or `down`.
	if len(labs) > 1 {
		if live := slices.DeleteFunc(slices.Clone(labs), func(p Place) bool { return !answers(filepath.Join(p.Dir, "lab.sock")) }); len(live) > 0 {
			labs = live
		}
	}
	switch len(labs) {
	case 0:
		return Place{}, fmt.Errorf("%s: %w", runDir, ErrNone)
	case 1:
		return labs[0], nil
	}
	var names []string
	for _, l := range labs {
		names = append(names, l.Lab)
	}
	return Place{}, fmt.Errorf("several labs run (%s): choose one with --lab or WEIR_LAB", strings.Join(names, ", "))
}

func labsIn(runDir string) ([]Place, error) {
	entries, err := os.ReadDir(runDir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("look for labs: %w", err)
	}
	var labs []Place
	for _, e := range entries {
		dir := filepath.Join(runDir, e.Name())
		sockets, err := filepath.Glob(filepath.Join(dir, "*.sock"))
		if err == nil && e.IsDir() && len(sockets) > 0 {
			labs = append(labs, Place{Lab: e.Name(), Dir: dir})
		}
	}
	return labs, nil
}

func answers(socket string) bool {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

// Central returns the socket of a central part, such as "observer".
func (p Place) Central(part string) Socket {
	return p.check(Socket{Part: part, Path: filepath.Join(p.Dir, part+".sock")})
}

// Replicas returns the sockets of a central part and of its replicas (policy-2, ...), those that are there first.
func (p Place) Replicas(part string) []Socket {
	out := []Socket{p.Central(part)}
	paths, err := filepath.Glob(filepath.Join(p.Dir, part+"-*.sock"))
	if err != nil {
		return out
	}
	for _, path := range paths {
		out = append(out, Socket{Part: strings.TrimSuffix(filepath.Base(path), ".sock"), Path: path})
	}
	slices.SortStableFunc(out, func(a, b Socket) int { return cmp.Compare(absent(a), absent(b)) })
	return out
}

func absent(s Socket) int {
	if s.Missing {
		return 1
	}
	return 0
}

// AgentFolders are where a lab's agent of a node keeps its state and its pins.
func (p Place) AgentFolders(node string) (state, bpffs string) {
	return filepath.Join("/var/lib/weir", p.Lab, "nodes", node), filepath.Join("/sys/fs/bpf/weir", p.Lab, node)
}

// Agents returns the agents' sockets by node. A node's folder without a socket counts as missing.
func (p Place) Agents() []Socket { return p.ofNodes("agent") }

// ofNodes returns the sockets of a part that every node has, by node.
func (p Place) ofNodes(part string) []Socket {
	if p.Lab == "" {
		return []Socket{p.check(Socket{Part: part, Path: filepath.Join(p.Dir, part+".sock")})}
	}
	var out []Socket
	nodes, err := os.ReadDir(filepath.Join(p.Dir, "nodes"))
	if err != nil {
		return nil
	}
	for _, n := range nodes {
		if n.IsDir() {
			out = append(out, p.check(Socket{Part: part, Node: n.Name(), Path: filepath.Join(p.Dir, "nodes", n.Name(), part+".sock")}))
		}
	}
	return out
}

// central are the parts that every lab has.
var central = []string{"policy", "identity", "xds", "relay", "observer"}

// local are the parts that every node has.
var local = []string{"agent", "dns", "proxy"}

// Parts returns the sockets of all parts, central ones first; those that a lab must have and lacks are marked.
func (p Place) Parts() []Socket {
	var out []Socket
	if p.Lab == "" {
		return p.nodeParts()
	}
	for _, part := range central {
		out = append(out, p.Central(part))
	}
	sockets, err := filepath.Glob(filepath.Join(p.Dir, "*.sock"))
	if err == nil {
		for _, path := range sockets {
			part := strings.TrimSuffix(filepath.Base(path), ".sock")
			// The lab's own socket speaks another protocol.
			if part != "lab" && !slices.Contains(central, part) {
				out = append(out, Socket{Part: part, Path: path})
			}
		}
	}
	slices.SortStableFunc(out, func(a, b Socket) int { return cmp.Compare(rank(a.Part), rank(b.Part)) })
	return append(out, p.nodeParts()...)
}

func (p Place) nodeParts() []Socket {
	var all []Socket
	for _, part := range local {
		all = append(all, p.ofNodes(part)...)
	}
	return all
}

// rank keeps replicas beside the first of their kind.
func rank(part string) int {
	kind, _, _ := strings.Cut(part, "-")
	if i := slices.Index(central, kind); i >= 0 {
		return i
	}
	return len(central)
}

func (p Place) check(s Socket) Socket {
	_, err := os.Stat(s.Path)
	s.Missing = err != nil
	return s
}
