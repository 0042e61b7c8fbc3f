// SPDX-License-Identifier: Apache-2.0

// Package h1 speaks HTTP/1 behind the library's interfaces: a server that calls an http.Handler, a client connection that is an http.RoundTripper. Both do a
// connection's work in the goroutine that has it, with buffers that the connection keeps; the library's hand each message through three goroutines a side.
//
// The benchmark of package httpproxy runs both; its tests run over both, the library's being the oracle. Deleting this package, and the two places that choose
// it, leaves the library's.
package h1

import (
	"bytes"
	"errors"
	"io"
	"net/http"

	"github.com/weirmesh/weir/services/proxy/internal/strict"
)

// buffer is what was read of a connection and not used.
type buffer struct {
	r    io.Reader
	b    []byte
	i, j int
}

const (
	bufferSize = 4 << 10
	maxLine    = 4 << 10
)

func (b *buffer) data() []byte { return b.b[b.i:b.j] }

// fill reads more, after what is there.
func (b *buffer) fill() error {
	if b.i == b.j {
		b.i, b.j = 0, 0
	}
	switch {
	case b.b == nil:
		b.b = make([]byte, bufferSize)
	case b.j < len(b.b):
	case b.i > 0:
		b.j = copy(b.b, b.b[b.i:b.j])
		b.i = 0
	default:
		b.b = append(b.b, make([]byte, len(b.b))...)
	}
	n, err := b.r.Read(b.b[b.j:])
	b.j += n
	if n > 0 {
		return nil
	}
	if err == nil {
		err = io.ErrNoProgress
	}
	return err
}

// shrink gives a buffer back that a large head has made large.
func (b *buffer) shrink() {
	if len(b.b) > 4*bufferSize && b.i == b.j {
		b.b, b.i, b.j = nil, 0, 0
	}
}

type framing uint8

const (
	none framing = iota
	fixed
	chunkSize
	chunkData
	chunkEnd
	trailers
	untilClose
)

// body decodes a message's body.
type body struct {
	src *buffer
	// lenient reads what servers write that clients may not.
	lenient bool
	limits  strict.Limits
	state   framing
	remain  int64
	trailer http.Header
	err     error
}

func (d *body) begin(length int64) {
	d.err, d.trailer = nil, nil
	switch {
	case length > 0:
		d.state, d.remain = fixed, length
	case length < 0:
		d.state = chunkSize
	default:
		d.state, d.err = none, io.EOF
	}
}

// ended reports whether the body has come to its end as it should.
func (d *body) ended() bool { return atEnd(d.err) }

// atEnd: an error that wraps io.EOF is a fault, never a body's end.
func atEnd(err error) bool { return err == io.EOF } //nolint:errorlint // see above

// Read implements io.Reader.
func (d *body) Read(p []byte) (int, error) {
	for d.err == nil {
		n, err := d.step(p)
		d.fail(err)
		if n > 0 {
			if d.state == fixed && d.remain == 0 {
				d.err = io.EOF
			}
			return n, d.err
		}
	}
	return 0, d.err
}

func (d *body) fail(err error) {
	if err == nil {
		return
	}
	if errors.Is(err, io.EOF) && d.state != untilClose && d.state != none {
		err = io.ErrUnexpectedEOF
	}
	d.err = err
}

func (d *body) step(p []byte) (int, error) {
	switch d.state {
	case fixed, chunkData:
		n, err := d.take(p[:min(int64(len(p)), d.remain)])
		if d.remain -= int64(n); d.remain == 0 && d.state == chunkData {
			d.state = chunkEnd
		}
		return n, err
	case untilClose:
		return d.take(p)
	case chunkSize:
		return 0, d.size()
	case chunkEnd:
		line, err := d.line()
		if err == nil && len(line) > 0 {
			err = &strict.Error{Status: http.StatusBadRequest, Cause: "chunk-end"}
		}
		if err == nil {
			d.state = chunkSize
		}
		return 0, err
	case trailers:
		return 0, d.readTrailer()
	}
	return 0, io.EOF
}

func (d *body) take(p []byte) (int, error) {
	if d.src.i < d.src.j {
		n := copy(p, d.src.data())
		d.src.i += n
		return n, nil
	}
	return d.src.r.Read(p)
}

// line takes a line off, without its end.
func (d *body) line() ([]byte, error) {
	for {
		data := d.src.data()
		i := bytes.IndexByte(data, '\n')
		if i >= 0 {
			d.src.i += i + 1
			if i > 0 && data[i-1] == '\r' {
				return data[:i-1], nil
			}
			if d.lenient {
				return data[:i], nil
			}
			return nil, &strict.Error{Status: http.StatusBadRequest, Cause: "bare-lf"}
		}
		limit := maxLine
		if d.state == chunkEnd {
			limit = 1
		}
		if len(data) > limit {
			cause := "chunk-line"
			if d.state == chunkEnd {
				cause = "chunk-end"
			}
			return nil, &strict.Error{Status: http.StatusBadRequest, Cause: cause}
		}
		if err := d.src.fill(); err != nil {
			return nil, err
		}
	}
}

func (d *body) size() error {
	line, err := d.line()
	if err != nil {
		return err
	}
	if d.lenient {
		line = bytes.TrimRight(line, " \t")
	}
	n, err := strict.ChunkSize(line)
	if err != nil {
		return err
	}
	d.state, d.remain = chunkData, n
	if n == 0 {
		d.state = trailers
	}
	return nil
}

func (d *body) readTrailer() error {
	for {
		data := d.src.data()
		n := 0
		if bytes.HasPrefix(data, []byte("\r\n")) {
			n = 2
		} else if d.lenient && bytes.HasPrefix(data, []byte("\n")) {
			d.src.i++
			return io.EOF
		} else if len(data) > 1 {
			var err error
			if n, err = strict.TrailerEnd(data, d.limits); err != nil {
				return err
			}
		}
		if n > 0 {
			h, err := strict.Trailer(data[:n], d.limits)
			if err != nil {
				return err
			}
			d.src.i += n
			d.trailer = h
			return d.end()
		}
		if err := d.src.fill(); err != nil {
			return err
		}
	}
}

func (d *body) end() error {
	d.state = none
	return io.EOF
}
