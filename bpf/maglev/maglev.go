// SPDX-License-Identifier: Apache-2.0

// Package maglev makes lookup tables for consistent choice, as "Maglev: A Fast and Reliable Software Network Load Balancer" (NSDI 2016),
// section 3.4, gives them: every backend has nearly the same share of the slots, and when backends come or go few slots of the others change.
package maglev

import (
	"hash/fnv"
	"math/big"
)

// Table returns, for each of size slots, the index of the backend that has it. Names are different from one another; equal names in equal
// order give equal tables everywhere. Size is a prime, at least 100 times as many as backends for shares that differ by at most one in a hundred. Without
// backends there is no table.
func Table(names [][]byte, size int) []uint16 {
	if len(names) == 0 {
		return nil
	}
	m := uint64(size)
	next, skip := make([]uint64, len(names)), make([]uint64, len(names))
	for i, name := range names {
		next[i], skip[i] = hash(name, 0)%m, hash(name, 1)%(m-1)+1
	}
	table := make([]uint16, size)
	taken := make([]bool, size)
	for filled := 0; ; {
		for i := range names {
			for taken[next[i]] {
				next[i] = (next[i] + skip[i]) % m
			}
			table[next[i]], taken[next[i]] = uint16(i), true
			if filled++; filled == size {
				return table
			}
		}
	}
}

// hash is FNV-1a of a kind, finished so that all bits depend on all of the name.
func hash(name []byte, kind byte) uint64 {
	h := fnv.New64a()
	h.Write([]byte{kind})
	h.Write(name)
	x := h.Sum64()
	x ^= x >> 33
	x *= 0xff51afd7ed558ccd
	x ^= x >> 33
	x *= 0xc4ceb9fe1a85ec53
	return x ^ x>>33
}

// MaxSize is the greatest size of a table.
const MaxSize = 16381

// ValidSize says whether a table can have this size.
func ValidSize(size int) bool {
	return size > 2 && size <= MaxSize && big.NewInt(int64(size)).ProbablyPrime(0)
}
