// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Bits of a record's header in a BPF ring buffer.
const (
	ringBusy    = 1 << 31
	ringDiscard = 1 << 30
	ringHeader  = 8
)

// ring is one BPF ring buffer, mapped. The kernel would map the data twice in a row, so that no record is cut in two, but both mappings count
// as this process's memory: once will do, and the record at the end is put together.
type ring struct {
	size     int
	mask     uint64
	control  []byte // the consumer's page, ours to write
	memory   []byte // the producer's page and the data
	data     []byte
	consumer *uint64
	producer *uint64

	read uint64 // position behind the last record taken
	end  uint64 // producer's position when last looked at

	// The record at read, when peek has found one.
	have bool
	rec  *Record // nil = undecodable
	cut  Record  // a record that goes round the end
	time uint64
	next uint64
}

func mapRing(fd, size int) (*ring, error) {
	page := os.Getpagesize()
	control, err := unix.Mmap(fd, 0, page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map consumer page: %w", err)
	}
	memory, err := unix.Mmap(fd, int64(page), page+size, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("map data: %w", err), unix.Munmap(control))
	}
	r := newRing(control, memory[:page], memory[page:], size)
	r.memory = memory
	return r, nil
}

// newRing reads a ring that is laid out in memory.
func newRing(control, producer, data []byte, size int) *ring {
	return &ring{
		size: size, mask: uint64(size - 1), control: control, data: data,
		consumer: (*uint64)(unsafe.Pointer(&control[0])),
		producer: (*uint64)(unsafe.Pointer(&producer[0])),
	}
}

func (r *ring) unmap() error {
	return errors.Join(unix.Munmap(r.control), unix.Munmap(r.memory))
}

// resume begins at a saved position, if that can be one of this ring, else where the consumer stands.
func (r *ring) resume(saved uint64) {
	consumer := atomic.LoadUint64(r.consumer)
	r.read = consumer
	if saved > consumer && saved <= atomic.LoadUint64(r.producer) {
		r.read = saved
	}
}

func (r *ring) refresh() { r.end = atomic.LoadUint64(r.producer) }

// peek finds the next record, passing over discarded ones.
func (r *ring) peek() bool {
	for !r.have && r.read < r.end {
		at := r.read & r.mask
		header := atomic.LoadUint32((*uint32)(unsafe.Pointer(&r.data[at])))
		if header&ringBusy != 0 {
			return false
		}
		length := int(header &^ (ringBusy | ringDiscard))
		r.next = r.read + uint64((length+ringHeader+7)&^7)
		if header&ringDiscard != 0 {
			r.read = r.next
			continue
		}
		r.have = true
		r.rec = nil
		if length == RecordSize {
			r.rec = r.record(int((r.read + ringHeader) & r.mask))
			if r.rec.check() != nil {
				r.rec = nil
			}
		}
		if r.rec != nil {
			r.time = r.rec.Time
		}
		// An undecodable record keeps the time of the one before it.
	}
	return r.have
}

// record returns the record at an offset.
func (r *ring) record(at int) *Record {
	if at+RecordSize <= r.size {
		return (*Record)(unsafe.Pointer(&r.data[at]))
	}
	b := unsafe.Slice((*byte)(unsafe.Pointer(&r.cut)), RecordSize)
	n := copy(b, r.data[at:])
	copy(b[n:], r.data)
	return &r.cut
}

// take returns the record that peek has found, and the position behind it.
func (r *ring) take() (*Record, uint64) {
	r.have = false
	r.read = r.next
	return r.rec, r.read
}

func (r *ring) commit(pos uint64) error {
	consumer := atomic.LoadUint64(r.consumer)
	if pos > r.read {
		return fmt.Errorf("position %d: read up to %d", pos, r.read)
	}
	if pos > consumer {
		atomic.StoreUint64(r.consumer, pos)
	}
	return nil
}
