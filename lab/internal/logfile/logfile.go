// SPDX-License-Identifier: Apache-2.0

// Package logfile keeps what a program writes, in two files of bounded size, and lets readers follow.
package logfile

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
)

// File is a log. The newest part is at its path, the part before at path + ".1"; what is older is gone. Safe for concurrent use.
type File struct {
	path string
	max  int64

	mu      sync.Mutex
	file    *os.File
	size    int64
	written int64         // bytes since Open, all rotations included
	changed chan struct{} // closed and replaced at each write
	closed  bool
}

// Open makes a log at path, which keeps between max and twice max bytes.
func Open(path string, max int64) (*File, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	file, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	return &File{path: path, max: max, file: file, changed: make(chan struct{})}, nil
}

// Path returns where the newest part is.
func (f *File) Path() string { return f.path }

// Write appends.
func (f *File) Write(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return 0, os.ErrClosed
	}
	if f.size > 0 && f.size+int64(len(p)) > f.max {
		if err := f.rotate(); err != nil {
			return 0, err
		}
	}
	n, err := f.file.Write(p)
	f.size += int64(n)
	f.written += int64(n)
	close(f.changed)
	f.changed = make(chan struct{})
	return n, err
}

func (f *File) rotate() error {
	if err := os.Rename(f.path, f.path+".1"); err != nil {
		return fmt.Errorf("rotate log: %w", err)
	}
	file, err := os.OpenFile(f.path, os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("rotate log: %w", err)
	}
	f.file.Close()
	f.file, f.size = file, 0
	return nil
}

// Close ends the log; followers end too.
func (f *File) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return nil
	}
	f.closed = true
	close(f.changed)
	return f.file.Close()
}

// Copy writes the log to w: what is kept (or its last tail lines; tail < 0 = all), then, with follow, what comes until ctx or the log
// ends.
func (f *File) Copy(ctx context.Context, w io.Writer, tail int, follow bool) error {
	data, position, err := f.kept()
	if err != nil {
		return err
	}
	if _, err := w.Write(lastLines(data, tail)); err != nil {
		return err
	}
	for follow {
		data, changed, next, ended, err := f.since(position)
		if err != nil {
			return err
		}
		if len(data) > 0 {
			if _, err := w.Write(data); err != nil {
				return err
			}
		}
		position = next
		if ended {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
	return nil
}

// kept returns both parts, and the position after them.
func (f *File) kept() ([]byte, int64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	old, err := os.ReadFile(f.path + ".1")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, 0, fmt.Errorf("read log: %w", err)
	}
	current, err := os.ReadFile(f.path)
	if err != nil {
		return nil, 0, fmt.Errorf("read log: %w", err)
	}
	return append(old, current...), f.written, nil
}

// since returns what was written after position; what was rotated away meanwhile is skipped.
func (f *File) since(position int64) (data []byte, changed <-chan struct{}, next int64, ended bool, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	missing := f.written - position
	if missing > f.size {
		old, err := os.ReadFile(f.path + ".1")
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, nil, 0, false, fmt.Errorf("read log: %w", err)
		}
		want := min(missing-f.size, int64(len(old)))
		data = append(data, old[int64(len(old))-want:]...)
		missing = f.size
	}
	if missing > 0 {
		current, err := os.ReadFile(f.path)
		if err != nil {
			return nil, nil, 0, false, fmt.Errorf("read log: %w", err)
		}
		data = append(data, current[int64(len(current))-missing:]...)
	}
	return data, f.changed, f.written, f.closed, nil
}

// lastLines returns the last n lines of data; all for n < 0.
func lastLines(data []byte, n int) []byte {
	if n < 0 {
		return data
	}
	end := len(data)
	if end > 0 && data[end-1] == '\n' {
		end--
	}
	start := len(data)
	for ; n > 0; n-- {
		i := bytes.LastIndexByte(data[:end], '\n')
		start = i + 1
		if i < 0 {
			break
		}
		end = i
	}
	return data[start:]
}
