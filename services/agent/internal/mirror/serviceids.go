// SPDX-License-Identifier: Apache-2.0

package mirror

import (
	"encoding/json"
	"errors"
	"io/fs"
	"net/netip"

	"github.com/weirmesh/weir/bpf/datapath"
	"github.com/weirmesh/weir/services/agent/internal/statefile"
)

// ServiceIDs gives frontends their numbers and keeps them on disk: connections in the kernel carry them, so a number must mean the same frontend
// after a restart, and is not given to another one.
type ServiceIDs struct {
	path string
	next uint32
	ids  map[datapath.Frontend]uint32
	// dirty: the file does not say what ids does.
	dirty bool
}

type serviceIDFile struct {
	Next uint32          `json:"next"`
	IDs  []serviceIDLine `json:"ids"`
}

type serviceIDLine struct {
	Frontend netip.AddrPort `json:"frontend"`
	Proto    uint8          `json:"proto"`
	ID       uint32         `json:"id"`
}

const (
	serviceIDKind    = "service-ids"
	serviceIDVersion = 1
)

// LoadServiceIDs reads the numbers; those that the kernel's maps hold (present) count where the file is missing or damaged.
func LoadServiceIDs(path string, present []datapath.Service) (*ServiceIDs, error) {
	s := &ServiceIDs{path: path, ids: map[datapath.Frontend]uint32{}}
	for _, p := range present {
		s.ids[p.Frontend] = p.ID
		s.next = max(s.next, p.ID)
	}
	b, err := statefile.Read(path, serviceIDKind, serviceIDVersion)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	var f serviceIDFile
	if err == nil {
		err = json.Unmarshal(b, &f)
	}
	s.next = max(s.next, f.Next)
	for _, l := range f.IDs {
		k := datapath.Frontend{Addr: l.Frontend.Addr(), Port: l.Frontend.Port(), Proto: l.Proto}
		if _, ok := s.ids[k]; !ok {
			s.ids[k] = l.ID
		}
	}
	return s, err
}

// Of returns the frontend's number, a new one if it has none. Save before the kernel learns of it.
func (s *ServiceIDs) Of(f datapath.Frontend) uint32 {
	if id, ok := s.ids[f]; ok {
		return id
	}
	s.next++
	if s.next == 0 {
		s.next = 1
	}
	s.ids[f], s.dirty = s.next, true
	return s.next
}

// Forget ends a frontend's number. It is not given out again before the counter comes round.
func (s *ServiceIDs) Forget(f datapath.Frontend) {
	delete(s.ids, f)
	s.dirty = true
}

// Save writes the numbers to disk if they have changed.
func (s *ServiceIDs) Save() error {
	if !s.dirty {
		return nil
	}
	file := serviceIDFile{Next: s.next}
	for f, id := range s.ids {
		file.IDs = append(file.IDs, serviceIDLine{netip.AddrPortFrom(f.Addr, f.Port), f.Proto, id})
	}
	b, err := json.Marshal(file)
	if err != nil {
		return err
	}
	if err := statefile.Write(s.path, serviceIDKind, serviceIDVersion, b); err != nil {
		return err
	}
	s.dirty = false
	return nil
}
