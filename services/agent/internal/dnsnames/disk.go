// SPDX-License-Identifier: Apache-2.0

package dnsnames

import (
	"bytes"
	"container/heap"
	"container/list"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/weirmesh/weir/services/agent/internal/statefile"
)

// On disk are all mappings as of the last save (a state file), and a journal of those that came since, so that whatever is in the maps is there too.
// A line is "<name> <address> <expiry, unix seconds> <endpoint>,<endpoint>..."; the journal's begin with a checksum, for its last one may be torn.
const (
	fileKind    = "dns-names"
	fileVersion = 1

	saveInterval = 5 * time.Second
	// saveRate bounds what saving writes, in bytes a second.
	saveRate = 512 << 10
	// restartGrace is how long what is loaded stays at least: what was prolonged just before the end may not be on disk.
	restartGrace = 30 * time.Second
)

// journal appends lines to a file. It is not synced: it outlives this process, and the maps do not outlive the machine either.
type journal struct {
	dir string

	mu   sync.Mutex
	file *os.File
}

func (j *journal) path(name string) string { return filepath.Join(j.dir, name) }

func (j *journal) append(lines []byte) error {
	if j.dir == "" || len(lines) == 0 {
		return nil
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.file == nil {
		f, err := os.OpenFile(j.path("names.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			return fmt.Errorf("journal of names: %w", err)
		}
		j.file = f
	}
	if _, err := j.file.Write(lines); err != nil {
		return fmt.Errorf("journal of names: %w", err)
	}
	return nil
}

// rotate begins a new journal; the old one is kept until drop.
func (j *journal) rotate() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.file == nil {
		return nil
	}
	err := j.file.Close()
	j.file = nil
	// An older one is there only if the last save failed: then both are needed, and this one goes on.
	if _, statErr := os.Stat(j.path("names.log.old")); statErr == nil {
		return err
	}
	if renameErr := os.Rename(j.path("names.log"), j.path("names.log.old")); !errors.Is(renameErr, fs.ErrNotExist) {
		err = errors.Join(err, renameErr)
	}
	return err
}

func (j *journal) drop() error {
	if err := os.Remove(j.path("names.log.old")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// freshLocked returns the journal's lines of new mappings.
func (e *Engine) freshLocked() []byte {
	fresh := e.fresh
	e.fresh = nil
	if e.cfg.Dir == "" {
		return nil
	}
	var out, line []byte
	for _, m := range fresh {
		line = appendLine(line[:0], m)
		out = fmt.Appendf(out, "%08x ", crc32.ChecksumIEEE(line))
		out = append(out, line...)
	}
	return out
}

func appendLine(out []byte, m *mapping) []byte {
	out = append(out, m.name.text...)
	out = append(out, ' ')
	out = m.address.addr.AppendTo(out)
	out = append(out, ' ')
	out = strconv.AppendInt(out, m.expires.Unix()+1, 10)
	out = append(out, ' ')
	for i, l := range m.leases {
		if i > 0 {
			out = append(out, ',')
		}
		out = strconv.AppendUint(out, uint64(l.endpoint.id), 10)
	}
	return append(out, '\n')
}

// Save writes all mappings.
func (e *Engine) Save() error {
	if e.cfg.Dir == "" {
		return nil
	}
	if err := e.disk.rotate(); err != nil {
		return fmt.Errorf("journal of names: %w", err)
	}
	_, err := e.save()
	return err
}

func (e *Engine) save() (int, error) {
	e.mu.Lock()
	e.dirtyDisk = false
	payload := make([]byte, 0, 64*e.mappings)
	for _, n := range e.names {
		for _, m := range n.mappings {
			payload = appendLine(payload, m)
		}
	}
	e.mu.Unlock()
	if err := statefile.Write(e.disk.path("names"), fileKind, fileVersion, payload); err != nil {
		e.mu.Lock()
		e.dirtyDisk = true
		e.mu.Unlock()
		return len(payload), err
	}
	return len(payload), e.disk.drop()
}

func (e *Engine) unsaved(err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if (err != nil) == e.stats.Unsaved {
		return
	}
	e.stats.Unsaved = err != nil
	if err != nil {
		e.log.Error("names are not on disk", "error", err)
	} else {
		e.log.Info("names are on disk again")
	}
}

func (e *Engine) keepSaved(ctx context.Context) {
	if e.cfg.Dir == "" {
		return
	}
	timer := time.NewTimer(saveInterval)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			e.unsaved(e.Save())
			return
		case <-timer.C:
		}
		next := saveInterval
		e.mu.Lock()
		dirty := e.dirtyDisk
		e.mu.Unlock()
		if dirty {
			err := e.disk.rotate()
			size, saveErr := e.save()
			e.unsaved(errors.Join(err, saveErr))
			next = max(next, time.Duration(size)*time.Second/saveRate)
		}
		timer.Reset(next)
	}
}

// Load reads the names that an earlier process kept, and what it left in the maps. What cannot be read is left out, and told in the error.
func (e *Engine) Load() error {
	var errs []error
	if e.cfg.Dir != "" {
		payload, err := statefile.Read(e.disk.path("names"), fileKind, fileVersion)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
		e.loadLines(payload, false)
		for _, file := range []string{"names.log.old", "names.log"} {
			lines, err := os.ReadFile(e.disk.path(file))
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			}
			e.loadLines(lines, true)
		}
	}
	if err := e.adopt(); err != nil {
		errs = append(errs, fmt.Errorf("read the maps of names: %w", err))
	}
	e.mu.Lock()
	e.fresh, e.dirtyDisk = nil, true
	e.mu.Unlock()
	e.kick()
	return errors.Join(errs...)
}

func (e *Engine) loadLines(lines []byte, summed bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	now := e.cfg.Now()
	for line := range bytes.Lines(lines) {
		if summed {
			sum, rest, _ := bytes.Cut(line, []byte(" "))
			if string(sum) != fmt.Sprintf("%08x", crc32.ChecksumIEEE(rest)) {
				continue
			}
			line = rest
		}
		x, ok := parseLine(string(line))
		if !ok || e.mappings >= e.cfg.Max {
			continue
		}
		e.restoreLocked(x, now)
	}
}

type savedMapping struct {
	name      string
	addr      netip.Addr
	expires   time.Time
	endpoints []uint16
}

func parseLine(line string) (savedMapping, bool) {
	fields := strings.Split(strings.TrimSuffix(line, "\n"), " ")
	if len(fields) != 4 || !strings.HasSuffix(fields[0], ".") {
		return savedMapping{}, false
	}
	addr, err := netip.ParseAddr(fields[1])
	seconds, err2 := strconv.ParseInt(fields[2], 10, 64)
	if err != nil || err2 != nil || addr.Zone() != "" {
		return savedMapping{}, false
	}
	x := savedMapping{name: fields[0], addr: addr.Unmap(), expires: time.Unix(seconds, 0)}
	for id := range strings.SplitSeq(fields[3], ",") {
		if n, err := strconv.ParseUint(id, 10, 16); err == nil {
			x.endpoints = append(x.endpoints, uint16(n))
		}
	}
	return x, true
}

func (e *Engine) restoreLocked(x savedMapping, now time.Time) {
	n := e.names[x.name]
	if n == nil {
		n = &name{text: x.name, matches: e.matchesLocked(x.name), mappings: map[netip.Addr]*mapping{}}
		e.names[x.name] = n
	}
	if earliest := now.Add(restartGrace); x.expires.Before(earliest) {
		x.expires = earliest
	}
	m := e.mapLocked(n, x.addr, x.expires)
	for _, id := range x.endpoints {
		ep := e.endpoints[id]
		if ep == nil {
			ep = &endpoint{id: id, leases: list.New(), perName: map[*name]int{}}
			e.endpoints[id] = ep
		}
		e.leaseLocked(ep, m)
	}
	if m.index >= 0 {
		heap.Fix(&e.expiring, m.index)
	}
}
