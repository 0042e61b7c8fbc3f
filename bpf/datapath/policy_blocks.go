// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
	"sort"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// policyBlockMax is the most ranges that a block may have (POLICY_BLOCK_BITS of lib/policy_types.h).
const policyBlockMax = 1<<18 - 1

// A range word: start in bits 40..63, verdict in 32..39, slot in 20..31, rule in 0..19.
const rangeDecision = 1<<40 - 1

func rangeStart(word uint64) uint32 { return uint32(word >> 40) }

// decision is the part of a word that is not the start.
func (r PolicyRange) decision() (uint64, error) {
	if r.Verdict < PolicyAllow || r.Verdict > PolicyVisible {
		return 0, fmt.Errorf("verdict %d: unknown", r.Verdict)
	}
	if r.Rule > MaxRule || r.Slot > MaxSlot {
		return 0, fmt.Errorf("rule %d, slot %d: want at most %d and %d", r.Rule, r.Slot, MaxRule, MaxSlot)
	}
	if proxied := r.Verdict == PolicyRedirect || r.Verdict == PolicyVisible; proxied != (r.Slot != 0) {
		return 0, fmt.Errorf("slot %d with verdict %v: a slot is for redirect and visible, and they need one", r.Slot, r.Verdict)
	}
	return uint64(r.Verdict)<<32 | uint64(r.Slot)<<20 | uint64(r.Rule), nil
}

// decisionOf makes a range of a word's decision.
func decisionOf(proto uint8, first, last uint16, decision uint64) PolicyRange {
	return PolicyRange{
		Proto: proto, First: first, Last: last, Verdict: PolicyVerdict(decision >> 32 & 0xff),
		Slot: slotOf(uint32(decision)), Rule: ruleOf(uint32(decision)),
	}
}

// slotOf and ruleOf are SLOT_OF and RULE_OF of lib/policy_types.h.
func slotOf(w uint32) uint16 { return uint16(w >> 20) }
func ruleOf(w uint32) uint32 { return w & MaxRule }

// encodeRanges makes a block: words in rising order of their starts, the first of which is 0.
func encodeRanges(ranges []PolicyRange) ([]uint64, error) {
	sorted := slices.Clone(ranges)
	slices.SortFunc(sorted, func(a, b PolicyRange) int {
		return cmp.Or(cmp.Compare(a.Proto, b.Proto), cmp.Compare(a.First, b.First))
	})
	const uncovered = uint64(PolicyDefaultDeny) << 32
	rest := uncovered
	var words []uint64
	emit := func(start uint32, decision uint64) {
		n := len(words)
		if n > 0 && rangeStart(words[n-1]) == start {
			words = words[:n-1]
			n--
		}
		if n == 0 || words[n-1]&rangeDecision != decision {
			words = append(words, uint64(start)<<40|decision)
		}
	}
	for i, r := range sorted {
		if r.First > r.Last {
			return nil, fmt.Errorf("ports %d to %d: not a range", r.First, r.Last)
		}
		decision, err := r.decision()
		if err != nil {
			return nil, err
		}
		same := i > 0 && sorted[i-1].Proto == r.Proto
		if same && sorted[i-1].Last >= r.First {
			return nil, fmt.Errorf("protocol %d: two ranges hold port %d", r.Proto, r.First)
		}
		if r.Proto == 0 {
			if r.First != 0 || r.Last != math.MaxUint16 {
				return nil, fmt.Errorf("ports %d to %d of any protocol: want all ports", r.First, r.Last)
			}
			rest = decision
			continue
		}
		first := uint32(r.Proto) << 16
		if len(words) == 0 {
			emit(0, rest)
		}
		if !same {
			emit(first, uncovered)
		}
		emit(first|uint32(r.First), decision)
		if r.Last < math.MaxUint16 {
			emit(first|uint32(r.Last)+1, uncovered)
		}
		if last := i+1 == len(sorted) || sorted[i+1].Proto != r.Proto; last && r.Proto < math.MaxUint8 {
			emit(first+1<<16, rest)
		}
	}
	if len(words) == 0 {
		emit(0, rest)
	}
	if len(words) > policyBlockMax {
		return nil, fmt.Errorf("%d ranges: %d are supported", len(words), policyBlockMax)
	}
	return words, nil
}

// decodeRanges is the reverse, in a normal form: protocols whose ports are all decided like those of protocol 0 are left out.
func decodeRanges(words []uint64) []PolicyRange {
	if len(words) == 0 {
		return nil
	}
	rest := words[0] & rangeDecision
	out := []PolicyRange{decisionOf(0, 0, math.MaxUint16, rest)}
	for i, w := range words {
		start, end := rangeStart(w), uint32(1<<24)
		if i+1 < len(words) {
			end = rangeStart(words[i+1])
		}
		for start < end {
			proto := uint8(start >> 16)
			stop := min(end, (start>>16+1)<<16)
			whole := start&0xffff == 0 && stop&0xffff == 0
			if proto != 0 && (!whole || w&rangeDecision != rest) {
				out = append(out, decisionOf(proto, uint16(start), uint16(stop-1), w&rangeDecision))
			}
			start = stop
		}
	}
	return out
}

// decideRange is the search of policy_decide.
func decideRange(words []uint64, proto uint8, port uint16) uint64 {
	key := uint32(proto)<<16 | uint32(port)
	i := sort.Search(len(words), func(i int) bool { return rangeStart(words[i]) > key })
	if i == 0 {
		return uint64(PolicyDefaultDeny) << 32
	}
	return words[i-1]
}

// block is a run of ranges in policy_ranges; equal ones are kept once.
type block struct {
	base  uint32
	words []uint64
	refs  int
}

// extent is unused room.
type extent struct{ base, size uint32 }

// blocks gives out room in policy_ranges. What is in use never changes; what is given back is used again only when no program can still
// be reading it.
type blocks struct {
	m         *ebpf.Map
	name      string
	byContent map[string]*block
	byBase    map[uint32]*block
	free      []extent // rising, never adjacent
	resting   []extent
}

func newBlocks(name string, m *ebpf.Map) *blocks {
	return &blocks{m: m, name: name, byContent: map[string]*block{}, byBase: map[uint32]*block{}}
}

func (b *blocks) max() int { return int(b.m.MaxEntries()) }

func (b *blocks) used() int {
	n := b.max()
	for _, e := range b.free {
		n -= int(e.size)
	}
	return n
}

func contentOf(words []uint64) string {
	buf := make([]byte, 0, len(words)*8)
	for _, w := range words {
		buf = binary.NativeEndian.AppendUint64(buf, w)
	}
	return string(buf)
}

// adopt notes a block that the maps hold from an earlier process.
func (b *blocks) adopt(base, count uint32) (*block, error) {
	if have := b.byBase[base]; have != nil && len(have.words) == int(count) {
		have.refs++
		return have, nil
	}
	words, err := b.read(base, count)
	if err != nil {
		return nil, err
	}
	blk := &block{base: base, words: words, refs: 1}
	b.byBase[base] = blk
	b.byContent[contentOf(words)] = blk
	return blk, nil
}

// settle finds what room the adopted blocks leave.
func (b *blocks) settle() {
	all := make([]*block, 0, len(b.byBase))
	for _, blk := range b.byBase {
		all = append(all, blk)
	}
	slices.SortFunc(all, func(x, y *block) int { return cmp.Compare(x.base, y.base) })
	b.free = nil
	next := uint32(0)
	for _, blk := range all {
		if blk.base > next {
			b.free = append(b.free, extent{next, blk.base - next})
		}
		next = blk.base + uint32(len(blk.words))
	}
	if size := uint32(b.max()); next < size {
		b.free = append(b.free, extent{next, size - next})
	}
}

func (b *blocks) read(base, count uint32) ([]uint64, error) { return readBlock(b.m, base, count) }

func readBlock(m *ebpf.Map, base, count uint32) ([]uint64, error) {
	if count == 0 || uint64(base)+uint64(count) > uint64(m.MaxEntries()) {
		return nil, fmt.Errorf("block of %d ranges at %d: not in the map", count, base)
	}
	words := make([]uint64, count)
	for i := range words {
		if err := m.Lookup(base+uint32(i), &words[i]); err != nil {
			return nil, fmt.Errorf("range %d: %w", base+uint32(i), err)
		}
	}
	return words, nil
}

// take returns the block with this content, which it writes if there is none, and counts a user of it.
func (b *blocks) take(words []uint64) (*block, error) {
	content := contentOf(words)
	if have := b.byContent[content]; have != nil {
		have.refs++
		return have, nil
	}
	size := uint32(len(words))
	base, ok := b.allocate(size)
	if !ok && len(b.resting) > 0 {
		if err := waitForPrograms(); err != nil {
			return nil, err
		}
		b.reclaim()
		base, ok = b.allocate(size)
	}
	if !ok {
		return nil, fmt.Errorf("%s (%d of %d): %w", b.name, b.used(), b.max(), ErrFull)
	}
	for i, w := range words {
		if err := b.m.Put(base+uint32(i), w); err != nil {
			b.give(extent{base, size})
			return nil, fmt.Errorf("range %d: %w", base+uint32(i), err)
		}
	}
	blk := &block{base: base, words: words, refs: 1}
	b.byBase[base] = blk
	b.byContent[content] = blk
	return blk, nil
}

func (b *blocks) allocate(size uint32) (uint32, bool) {
	for i := range b.free {
		e := &b.free[i]
		if e.size < size {
			continue
		}
		base := e.base
		e.base += size
		e.size -= size
		if e.size == 0 {
			b.free = slices.Delete(b.free, i, i+1)
		}
		return base, true
	}
	return 0, false
}

// release forgets one user; nobody's block rests.
func (b *blocks) release(blk *block) {
	blk.refs--
	if blk.refs > 0 {
		return
	}
	delete(b.byBase, blk.base)
	delete(b.byContent, contentOf(blk.words))
	b.resting = append(b.resting, extent{blk.base, uint32(len(blk.words))})
}

func (b *blocks) reclaim() {
	for _, e := range b.resting {
		b.give(e)
	}
	b.resting = nil
}

// give adds room to the free list.
func (b *blocks) give(e extent) {
	i, _ := slices.BinarySearchFunc(b.free, e, func(x, y extent) int { return cmp.Compare(x.base, y.base) })
	b.free = slices.Insert(b.free, i, e)
	if i+1 < len(b.free) && b.free[i].base+b.free[i].size == b.free[i+1].base {
		b.free[i].size += b.free[i+1].size
		b.free = slices.Delete(b.free, i+1, i+2)
	}
	if i > 0 && b.free[i-1].base+b.free[i-1].size == b.free[i].base {
		b.free[i-1].size += b.free[i].size
		b.free = slices.Delete(b.free, i, i+1)
	}
}

// waitForPrograms returns when every program run that had begun has ended: the kernel answers this call with a grace period of RCU, under
// which programs run.
func waitForPrograms() error {
	const membarrierGlobal = 1
	if _, _, errno := unix.Syscall(unix.SYS_MEMBARRIER, membarrierGlobal, 0, 0); errno != 0 {
		return fmt.Errorf("wait for program runs (membarrier): %w", errno)
	}
	return nil
}

// fullError turns the kernel's words for a full map into ErrFull.
func fullError(m *ebpf.Map, name string, err error) error {
	if errors.Is(err, unix.E2BIG) || errors.Is(err, unix.ENOSPC) {
		return fmt.Errorf("%s (%d entries): %w", name, m.MaxEntries(), ErrFull)
	}
	return err
}
