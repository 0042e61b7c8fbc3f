// SPDX-License-Identifier: Apache-2.0

// Package stage narrows streams: to what is not too old, to the first or to
// the newest of it. Only the things asked for count (flows, events); what
// comes between them, losses and states of nodes, passes along.
package stage

import (
	"errors"
	"io"
	"time"
)

// Recv gives the next record of a stream; io.EOF ends it. Not safe for concurrent use.
type Recv[T any] func() (T, error)

// Counts says whether a record is a thing that was asked for, and its time.
type Counts[T any] func(T) (time.Time, bool)

// maxOthers bounds how many records Tail keeps beside those that count.
const maxOthers = 4096

// NotBefore drops what is older than t.
func NotBefore[T any](recv Recv[T], counts Counts[T], t time.Time) Recv[T] {
	return func() (T, error) {
		for {
			r, err := recv()
			if err != nil {
				return r, err
			}
			if at, ok := counts(r); !ok || !at.Before(t) {
				return r, nil
			}
		}
	}
}

// Head ends a stream after n.
func Head[T any](recv Recv[T], counts Counts[T], n uint64) Recv[T] {
	return func() (T, error) {
		if n == 0 {
			var none T
			return none, io.EOF
		}
		r, err := recv()
		if err == nil {
			if _, ok := counts(r); ok {
				n--
			}
		}
		return r, err
	}
}

// Tail gives the newest n, once the stream has ended.
func Tail[T any](recv Recv[T], counts Counts[T], n uint64) Recv[T] {
	var kept []T
	ready := false
	return func() (T, error) {
		var none T
		if !ready {
			var err error
			if kept, err = newest(recv, counts, n); err != nil {
				return none, err
			}
			ready = true
		}
		if len(kept) == 0 {
			return none, io.EOF
		}
		r := kept[0]
		kept[0] = none
		kept = kept[1:]
		return r, nil
	}
}

func newest[T any](recv Recv[T], counts Counts[T], n uint64) ([]T, error) {
	var kept []T
	var none T
	var counted uint64
	others := 0
	for {
		r, err := recv()
		if errors.Is(err, io.EOF) {
			return kept, nil
		}
		if err != nil {
			return nil, err
		}
		kept = append(kept, r)
		if _, ok := counts(r); ok {
			counted++
		} else {
			others++
		}
		for counted > n || others > maxOthers {
			if _, ok := counts(kept[0]); ok {
				counted--
			} else {
				others--
			}
			kept[0] = none
			kept = kept[1:]
		}
	}
}
