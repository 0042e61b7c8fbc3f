// SPDX-License-Identifier: Apache-2.0

// Package part runs Weir's own processes in a lab: starts them, starts them again when they end, and stops them on demand for fault tests.
package part

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/weirmesh/weir/lab/internal/launch"
	"github.com/weirmesh/weir/lab/internal/ledger"
	"github.com/weirmesh/weir/lab/internal/logfile"
	"github.com/weirmesh/weir/lab/internal/process"
)

// Definition is one process of Weir's.
type Definition struct {
	// Name is how people call it: relay, relay-2, agent/node1.
	Name string
	// Launch says where it runs and what it is.
	Launch launch.Spec
	// Files, when given, opens what the process inherits from descriptor 4 on; called before each start.
	Files func() ([]*os.File, error)
	// Log is the path of its log.
	Log string
	// Sockets answer for its state (weir.status.v1).
	Sockets []string
}

// State of a part.
type State string

// States.
const (
	Running State = "running"
	// Waiting: it ended, and will be started again.
	Waiting State = "waiting"
	// Stopped by Kill or Stop.
	Stopped State = "stopped"
)

// Status is a part as it is now.
type Status struct {
	Definition
	State    State
	Pid      int
	Restarts int
	Started  time.Time
	LastExit string
}

// ErrUnknown says that there is no part of that name.
var ErrUnknown = errors.New("no such part")

const (
	logMax    = 16 << 20
	stopGrace = 10 * time.Second
)

// Manager runs the parts. Safe for concurrent use.
type Manager struct {
	self   string
	ledger *ledger.Ledger
	log    *slog.Logger

	mu    sync.Mutex
	parts []*part
	wait  sync.WaitGroup
}

type part struct {
	definition Definition
	output     *logfile.File
	commands   chan command
	stop       context.CancelFunc
	ended      chan struct{}

	mu     sync.Mutex
	status Status
}

type command struct {
	do      func(*process.Process) error // what happens to the process that runs; nil = start
	stay    bool                         // it stays down
	replace bool                         // start another one beside it
	done    chan error
}

// NewManager makes a manager that starts programs by self, which is weir-lab.
func NewManager(self string, l *ledger.Ledger, log *slog.Logger) *Manager {
	return &Manager{self: self, ledger: l, log: log.With("component", "parts")}
}

// Start starts a part and keeps it running until ctx ends.
func (m *Manager) Start(ctx context.Context, definition Definition) error {
	output, err := logfile.Open(definition.Log, logMax)
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(ctx)
	p := &part{definition: definition, output: output, commands: make(chan command), stop: stop, ended: make(chan struct{})}
	p.status = Status{Definition: definition, State: Waiting}
	first, err := m.launch(p)
	if err != nil {
		stop()
		return errors.Join(fmt.Errorf("start %s: %w", definition.Name, err), output.Close())
	}
	m.mu.Lock()
	m.parts = append(m.parts, p)
	m.mu.Unlock()
	m.wait.Go(func() {
		defer close(p.ended)
		defer output.Close()
		m.keep(ctx, p, first)
	})
	return nil
}

// Wait waits until all parts have ended, after the context of Start did.
func (m *Manager) Wait() { m.wait.Wait() }

// End stops all parts, those first of which first says so: what they still have to tell the others finds them there.
func (m *Manager) End(first func(Definition) bool) {
	m.mu.Lock()
	parts := slices.Clone(m.parts)
	m.mu.Unlock()
	for _, now := range []bool{true, false} {
		chosen := slices.DeleteFunc(slices.Clone(parts), func(p *part) bool { return first(p.definition) != now })
		for _, p := range chosen {
			p.stop()
		}
		for _, p := range chosen {
			<-p.ended
		}
	}
	m.wait.Wait()
}

func (m *Manager) launch(p *part) (*process.Process, error) {
	c := process.Command{Self: m.self, Launch: p.definition.Launch, Output: p.output}
	if p.definition.Files != nil {
		files, err := p.definition.Files()
		if err != nil {
			return nil, err
		}
		defer func() {
			for _, file := range files {
				file.Close()
			}
		}()
		c.Files = files
	}
	started, err := process.Start(c)
	if err != nil {
		return nil, err
	}
	// Also in its control group, which is on the list already; this entry is for people who read the list.
	if err := m.ledger.AddProcess(p.definition.Name, started.Pid); err != nil {
		return nil, errors.Join(err, started.Stop(0))
	}
	p.set(func(s *Status) { s.State, s.Pid, s.Started = Running, started.Pid, started.Started })
	return started, nil
}

func (p *part) set(f func(*Status)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f(&p.status)
}

// keep keeps a part running: it has one process, or a time at which it gets the next, or is down until somebody starts it.
func (m *Manager) keep(ctx context.Context, p *part, current *process.Process) {
	backoff := process.Backoff{First: time.Second, Max: 10 * time.Second, Forget: 10 * time.Second}
	var restart <-chan time.Time
	var replaced sync.WaitGroup
	defer replaced.Wait()
	launch := func() (err error) {
		restart = nil
		if current, err = m.launch(p); err != nil {
			current = nil
			restart = time.After(backoff.Next(0))
		}
		return err
	}
	for {
		var ended <-chan struct{}
		if current != nil {
			ended = current.Done()
		}
		select {
		case <-ctx.Done():
			if current != nil {
				if err := current.Stop(stopGrace); err != nil {
					m.log.Warn("part could not be stopped", "part", p.definition.Name, "error", err)
				}
				m.noteEnd(p, current, Stopped)
			}
			return
		case c := <-p.commands:
			var err error
			switch {
			case c.do == nil && current == nil:
				err = launch()
			case c.replace:
				before := current
				if err = launch(); err != nil {
					current, restart = before, nil
				} else {
					replaced.Go(func() { m.outlive(ctx, p, before) })
				}
			case c.do != nil && current != nil:
				err = c.do(current)
				m.noteEnd(p, current, Waiting)
				restart = time.After(backoff.Next(time.Since(current.Started)))
				current = nil
			}
			if c.stay {
				restart = nil
				p.set(func(s *Status) { s.State = Stopped })
			}
			c.done <- err
		case <-ended:
			m.log.Warn("part ended, will be started again", "part", p.definition.Name, "exit", current.Exit().String(), "log", p.definition.Log)
			m.noteEnd(p, current, Waiting)
			restart = time.After(backoff.Next(time.Since(current.Started)))
			current = nil
		case <-restart:
			if err := launch(); err != nil {
				m.log.Warn("part could not be started, will try again", "part", p.definition.Name, "error", err)
				continue
			}
			p.set(func(s *Status) { s.Restarts++ })
		}
	}
}

// outlive waits for a process that another one replaces to end by itself; it ends it when ctx ends.
func (m *Manager) outlive(ctx context.Context, p *part, before *process.Process) {
	select {
	case <-before.Done():
	case <-ctx.Done():
		if err := before.Stop(stopGrace); err != nil {
			m.log.Warn("replaced process could not be stopped", "part", p.definition.Name, "error", err)
		}
	}
	m.forget(before)
}

func (m *Manager) forget(ended *process.Process) {
	if err := m.ledger.ForgetProcess(ended.Pid); err != nil {
		m.log.Warn("ledger was not written", "error", err)
	}
}

func (m *Manager) noteEnd(p *part, ended *process.Process, state State) {
	exit := ended.Exit()
	m.forget(ended)
	p.set(func(s *Status) { s.State, s.Pid, s.LastExit = state, 0, exit.String() })
}

// List returns all parts in the order in which they were started.
func (m *Manager) List() []Status {
	m.mu.Lock()
	defer m.mu.Unlock()
	var all []Status
	for _, p := range m.parts {
		p.mu.Lock()
		all = append(all, p.status)
		p.mu.Unlock()
	}
	return all
}

// Kill kills a part, which then stays down.
func (m *Manager) Kill(ctx context.Context, name string) error {
	return m.command(ctx, name, command{do: kill, stay: true})
}

// Crash kills a part, which is started again as after any crash.
func (m *Manager) Crash(ctx context.Context, name string) error {
	return m.command(ctx, name, command{do: kill})
}

// StopPart asks a part to end; it then stays down.
func (m *Manager) StopPart(ctx context.Context, name string) error {
	return m.command(ctx, name, command{do: func(p *process.Process) error { return p.Stop(stopGrace) }, stay: true})
}

// StartPart starts a part that is down; one that runs is no error.
func (m *Manager) StartPart(ctx context.Context, name string) error {
	return m.command(ctx, name, command{})
}

// Replace starts a process beside the one that runs, for programs that take over from one another: from now on the part is the new one, and the old one is
// left to end by itself. One that is down is started.
func (m *Manager) Replace(ctx context.Context, name string) error {
	return m.command(ctx, name, command{replace: true})
}

func kill(p *process.Process) error {
	if err := p.Signal(syscall.SIGKILL); err != nil {
		return err
	}
	<-p.Done()
	return nil
}

func (m *Manager) command(ctx context.Context, name string, c command) error {
	m.mu.Lock()
	i := slices.IndexFunc(m.parts, func(p *part) bool { return p.definition.Name == name })
	if i < 0 {
		m.mu.Unlock()
		return fmt.Errorf("%s: %w", name, ErrUnknown)
	}
	p := m.parts[i]
	m.mu.Unlock()
	c.done = make(chan error, 1)
	select {
	case p.commands <- c:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-c.done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}
