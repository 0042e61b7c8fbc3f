// SPDX-License-Identifier: Apache-2.0

// Package lab is a cluster inside one machine: network namespaces for nodes, pods and outside hosts, Weir's real services and agents, and
// a supervisor that stands in for the API server, the controllers and the kubelets.
package lab

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/lab/internal/cluster"
	"github.com/weirmesh/weir/lab/internal/fabric"
	"github.com/weirmesh/weir/lab/internal/folder"
	"github.com/weirmesh/weir/lab/internal/ledger"
	"github.com/weirmesh/weir/lab/internal/manifest"
	"github.com/weirmesh/weir/lab/internal/netns"
	"github.com/weirmesh/weir/lab/internal/part"
	"github.com/weirmesh/weir/lab/internal/pod"
	"github.com/weirmesh/weir/lab/internal/preflight"
	"github.com/weirmesh/weir/lab/internal/zone"
)

// Lab is a lab. Make it with New, call Run once.
type Lab struct {
	config  Config
	log     *slog.Logger
	started time.Time
	machine preflight.Result
	nodes   []cluster.NodeConfig
	items   []manifest.Item

	ledger  *ledger.Ledger
	cluster *cluster.Cluster
	fabric  *fabric.Fabric
	parts   *part.Manager
	runner  *pod.Runner
	files   *folder.Follower
	certs   *certificates
}

// New checks the configuration, the machine and the manifests. Nothing is made yet.
func New(config Config, log *slog.Logger) (*Lab, error) {
	if config.BinDir == "" {
		config.BinDir = filepath.Dir(config.Self)
	}
	if err := config.Validate(); err != nil {
		return nil, err
	}
	l := &Lab{config: config, log: log, started: time.Now()}
	var err error
	if l.items, err = folder.Read(config.Manifests); err != nil {
		return nil, err
	}
	if err := l.planNodes(); err != nil {
		return nil, err
	}
	l.cluster = cluster.New(cluster.Config{
		Name: config.ClusterName, Nodes: l.nodes, Families: config.Families, ServiceV4: serviceV4, ServiceV6: serviceV6, BalancerV4: balancerV4, BalancerV6: balancerV6,
		DNSV4: dnsV4, DNSV6: dnsV6, Reserved: reservedNames, Now: time.Now,
	})
	if _, err := l.cluster.Apply(l.items); err != nil {
		return nil, err
	}
	if l.machine, err = preflight.Check(l.programs()); err != nil {
		return nil, fmt.Errorf("this machine cannot run a lab:\n%w", err)
	}
	return l, nil
}

// Run builds the lab, calls ready when Weir and the pods run, and takes everything away when ctx ends or the lab is told to end.
func (l *Lab) Run(ctx context.Context, ready func()) (err error) {
	release, err := claim(l.config.Name)
	if err != nil {
		return err
	}
	defer release()
	// What a lab of this name left that did not come to its end.
	if err := clean(l.config.Name); err != nil {
		return err
	}
	if err := l.pickPort(); err != nil {
		return err
	}
	if err := os.MkdirAll(RunDir(l.config.Name), 0o700); err != nil {
		return fmt.Errorf("make the lab's folder: %w", err)
	}
	// The folder is a new one: hold it like the first.
	hold, err := claim(l.config.Name)
	if err != nil {
		return err
	}
	defer hold()
	if l.ledger, err = ledger.Create(ledgerPath(l.config.Name), l.config.Name); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, clean(l.config.Name)) }()
	return l.run(ctx, ready)
}

func (l *Lab) run(ctx context.Context, ready func()) error {
	ctx, end := context.WithCancel(ctx)
	defer end()
	for _, step := range []struct {
		words string
		do    func() error
	}{
		{"folders", l.makeFolders},
		{"certificates", l.makeCertificates},
		{"network", l.makeNetwork},
	} {
		if err := step.do(); err != nil {
			return fmt.Errorf("build lab: %s: %w", step.words, err)
		}
	}
	for _, note := range l.notes() {
		l.say("note: %s", note)
	}
	zoneWriter, err := zone.NewWriter(l.cluster, l.zonePath())
	if err != nil {
		return err
	}
	if l.files, err = folder.NewFollower(l.config.Manifests, l.items, l.cluster, l.log); err != nil {
		return err
	}
	l.parts = part.NewManager(l.config.Self, l.ledger, l.log)
	l.runner = pod.NewRunner(l.runnerConfig())
	serve, err := l.servers(end)
	if err != nil {
		return err
	}

	// The parts outlive everything else: pods are unplugged and flows flushed with their help; the agents' by way of the central ones.
	partsCtx := context.WithoutCancel(ctx)
	defer l.parts.End(func(d part.Definition) bool { return strings.HasPrefix(d.Name, agentPrefix) })
	group, groupCtx := errgroup.WithContext(ctx)
	for _, s := range serve {
		group.Go(func() error { return s(groupCtx) })
	}
	group.Go(func() error { return zoneWriter.Run(groupCtx) })
	group.Go(func() error { return l.newRouter().Run(groupCtx) })
	group.Go(func() error { return l.start(groupCtx, partsCtx, group, ready) })
	err = group.Wait()
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		err = nil
	}
	l.say("lab %s ends", l.config.Name)
	return err
}

// pickPort chooses the observer's port when any will do: the same for the whole life of the lab.
func (l *Lab) pickPort() error {
	host, port, err := net.SplitHostPort(l.config.ObserverListen)
	if err != nil || port != "0" {
		return nil
	}
	listener, err := net.Listen("tcp", l.config.ObserverListen)
	if err != nil {
		return fmt.Errorf("find a port for the observer: %w", err)
	}
	l.config.ObserverListen = net.JoinHostPort(host, strconv.Itoa(listener.Addr().(*net.TCPAddr).Port))
	return listener.Close()
}

// start starts the parts, then the pods, and says when each are ready.
func (l *Lab) start(ctx, partsCtx context.Context, group *errgroup.Group, ready func()) error {
	definitions, err := l.definitions()
	if err != nil {
		return err
	}
	for _, definition := range definitions {
		if err := l.parts.Start(partsCtx, definition); err != nil {
			return err
		}
	}
	if err := l.awaitParts(ctx, definitions); err != nil {
		return err
	}
	l.say("Weir is ready: %d nodes, observer on %s", len(l.nodes), l.config.ObserverListen)
	group.Go(func() error { return l.runner.Run(ctx) })
	group.Go(func() error { return l.files.Run(ctx) })
	// Like a cluster that somebody comes to: its DNS is there first. If it is not soon, that is not worth waiting for.
	l.awaitPods(ctx, systemHead, systemPod)
	l.runner.Release()
	if waiting := l.awaitPods(ctx, l.config.Timeout, everything); len(waiting) > 0 && ctx.Err() == nil {
		l.say("not ready after %s:\n  %s", l.config.Timeout, strings.Join(waiting, "\n  "))
	} else if ctx.Err() == nil {
		l.say("all pods are ready")
	}
	if ctx.Err() == nil {
		ready()
	}
	return nil
}

// say tells the person who started the lab.
func (l *Lab) say(format string, args ...any) {
	fmt.Fprintf(l.config.Output, format+"\n", args...)
}

func (l *Lab) notes() []string {
	notes := append([]string(nil), l.machine.Notes...)
	for _, item := range l.items {
		for _, note := range item.Notes {
			notes = append(notes, fmt.Sprintf("%s:%d: %s", item.File, item.Line, note))
		}
	}
	return notes
}

// programs are those that the lab cannot do without.
func (l *Lab) programs() []string {
	names := []string{"weir-agent", "weir-cni", "weir-dns", "weir-proxy"}
	if l.config.Separate {
		names = append(names, "weir-xds", "weir-policy", "weir-identity", "weir-relay", "weir-observer")
	}
	var paths []string
	for _, name := range names {
		paths = append(paths, filepath.Join(l.config.BinDir, name))
	}
	return paths
}

func (l *Lab) cgroupRoot() string      { return filepath.Join(l.machine.CgroupRoot, "weir", l.config.Name) }
func (l *Lab) bpfRoot() string         { return filepath.Join(bpfRoot, l.config.Name) }
func (l *Lab) stateDir() string        { return filepath.Join(stateRoot, l.config.Name) }
func (l *Lab) runPath(s string) string { return filepath.Join(RunDir(l.config.Name), s) }
func (l *Lab) zonePath() string        { return l.runPath("dns/" + zone.Domain + ".zone") }

// partsCgroup holds Weir's own processes, which no pod's rules concern. No node can have this name.
func (l *Lab) partsCgroup() string { return filepath.Join(l.cgroupRoot(), "_weir") }

// nodeCgroup holds what is run on a node itself, beside its pods'. No pod's folder can have this name.
func (l *Lab) nodeCgroup(node string) string { return filepath.Join(l.cgroupRoot(), node, "_node") }

func (l *Lab) makeFolders() error {
	if l.machine.MountBPFFS {
		if err := l.ledger.Add(ledger.Mount, preflight.BPFFS); err != nil {
			return err
		}
		if err := preflight.MountBPF(); err != nil {
			return err
		}
	}
	// Shared folders first: they are removed last, and only when empty.
	for _, shared := range []string{filepath.Dir(l.cgroupRoot()), bpfRoot, stateRoot} {
		if err := l.ledger.Add(ledger.Parent, shared); err != nil {
			return err
		}
	}
	for _, own := range []struct {
		kind ledger.Kind
		path string
	}{{ledger.Cgroup, l.cgroupRoot()}, {ledger.Tree, l.bpfRoot()}, {ledger.Tree, l.stateDir()}} {
		if err := l.ledger.Add(own.kind, own.path); err != nil {
			return err
		}
	}
	folders := []string{l.partsCgroup(), l.bpfRoot(), l.stateDir(), l.runPath("logs"), l.runPath("dns"), l.runPath("tls")}
	for _, node := range l.nodes {
		folders = append(folders, l.nodeCgroup(node.Name), filepath.Join(l.bpfRoot(), node.Name),
			filepath.Join(l.stateDir(), "nodes", node.Name, "dns"), l.runPath("nodes/"+node.Name))
	}
	for _, path := range folders {
		if err := os.MkdirAll(path, 0o700); err != nil {
			return err
		}
	}
	if l.config.LogToFile {
		if err := l.moveLog(); err != nil {
			return err
		}
	}
	return nil
}

// moveLog makes the lab's own log the standard output and error of this process.
func (l *Lab) moveLog() error {
	file, err := os.OpenFile(l.runPath("logs/lab.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("open the lab's log: %w", err)
	}
	defer file.Close()
	for _, standard := range []int{1, 2} {
		if err := unix.Dup2(int(file.Fd()), standard); err != nil {
			return fmt.Errorf("move the lab's log: %w", err)
		}
	}
	return nil
}

func (l *Lab) makeNetwork() error {
	names := []string{l.config.fabricNetns(), l.config.centralNetns()}
	for _, node := range l.nodes {
		names = append(names, l.config.nodeNetns(node.Name))
	}
	for _, name := range names {
		if err := l.ledger.Add(ledger.Namespace, name); err != nil {
			return err
		}
		if err := netns.Create(name); err != nil {
			return err
		}
	}
	var err error
	l.fabric, err = fabric.Create(l.config.fabricNetns(), fabric.Router{V4: fabricV4, V6: fabricV6}, l.config.MTU)
	if err != nil {
		return err
	}
	if err := l.joinCentral(); err != nil {
		return err
	}
	for i := range l.nodes {
		if err := l.joinNode(i); err != nil {
			return err
		}
	}
	// The fabric forwards what nobody else knows.
	return fabric.SetRoutes(l.config.fabricNetns(), fabric.Bridge, l.toNodes(cluster.NodeConfig{}, nil))
}

func (l *Lab) runnerConfig() pod.Config {
	nodes := map[string]pod.Node{}
	for _, node := range l.nodes {
		nodes[node.Name] = pod.Node{
			Netns: netns.Path(l.config.nodeNetns(node.Name)), Cgroup: l.nodeCgroup(node.Name), Addresses: node.Addresses, Plugin: l.plugin(node.Name),
		}
	}
	return pod.Config{
		Lab: l.config.Name, Self: l.config.Self,
		Path:   l.config.BinDir + ":" + containerPath(),
		Env:    []string{"WEIR_LAB=" + l.config.Name, "WEIR_LAB_ZONE=" + l.zonePath()},
		Dir:    RunDir(l.config.Name),
		Cgroup: l.cgroupRoot(), DNS: l.config.dns(), Nodes: nodes, Outside: &outside{lab: l},
		Cluster: l.cluster, Ledger: l.ledger, Log: l.log.With("component", "pods"),
	}
}

// containerPath is the machine's PATH, or what a shell would have without one.
func containerPath() string {
	if path := os.Getenv("PATH"); strings.Contains(path, "/bin") {
		return path
	}
	return "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
}
