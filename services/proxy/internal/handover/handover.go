// SPDX-License-Identifier: Apache-2.0

// Package handover passes listening sockets from a process to the one that comes after it, so that no connection is lost between them.
//
// The new process asks and is given every socket. When it serves, it says so: the old one stops accepting, lets go of what both can not have (its own unix
// sockets, the admin port), answers, and ends when its connections have. If the new one dies before that, the old one goes on as if nothing had been.
package handover

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	wordTake     = "take 1\n"
	wordReady    = "ready\n"
	wordReleased = "freed\n"
	perFrame     = 64 // descriptors, below the kernel's 253
	maxFrame     = 1 << 20
	// patience is how long either side may take for one message, but for "ready".
	patience = 10 * time.Second
)

// frame names the descriptors that come with it.
type frame struct {
	Names []string `json:"names"`
	Last  bool     `json:"last"`
}

// Old is the side that gives.
type Old struct {
	// Sockets returns copies of the listening sockets, which are closed when they are sent.
	Sockets func() ([]*os.File, error)
	// Release stops accepting and lets go of what the new process needs.
	Release func()
}

// Serve answers one process after another until one has taken over; then it returns true. It returns false when ctx ends. The listener is closed.
func (o Old) Serve(ctx context.Context, ln net.Listener) (bool, error) {
	stop := context.AfterFunc(ctx, func() { _ = ln.Close() })
	defer stop()
	for {
		conn, err := ln.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return false, nil //nolint:nilerr // it was told to end
			}
			return false, fmt.Errorf("hot restart: %w", err)
		}
		unixConn, ok := conn.(*net.UnixConn)
		if !ok {
			return false, errors.Join(errors.New("hot restart: not a unix socket"), conn.Close())
		}
		taken, err := o.give(ctx, ln, unixConn)
		closeErr := conn.Close()
		if taken {
			return true, errors.Join(err, closeErr)
		}
		// The new process failed: this one goes on.
	}
}

// give serves one new process.
func (o Old) give(ctx context.Context, ln net.Listener, conn *net.UnixConn) (taken bool, err error) {
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return false, err
	}
	if err := expect(conn, wordTake); err != nil {
		return false, err
	}
	files, err := o.Sockets()
	if err != nil {
		return false, err
	}
	err = sendAll(conn, files)
	for _, f := range files {
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		return false, err
	}
	// The new process waits for its configuration as long as it likes.
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return false, err
	}
	if err := expect(conn, wordReady); err != nil {
		return false, err
	}
	closeErr := ln.Close()
	o.Release()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return true, errors.Join(closeErr, err)
	}
	_, err = io.WriteString(conn, wordReleased)
	return true, errors.Join(closeErr, err)
}

func expect(conn net.Conn, word string) error {
	got := make([]byte, len(word))
	if _, err := io.ReadFull(conn, got); err != nil {
		return err
	}
	if string(got) != word {
		return fmt.Errorf("hot restart: %q instead of %q", got, word)
	}
	return nil
}

func sendAll(conn *net.UnixConn, files []*os.File) error {
	for {
		n := min(len(files), perFrame)
		if err := sendFrame(conn, files[:n], n == len(files)); err != nil {
			return err
		}
		if files = files[n:]; len(files) == 0 {
			return nil
		}
	}
}

func sendFrame(conn *net.UnixConn, files []*os.File, last bool) error {
	f := frame{Last: last}
	var fds []int
	for _, file := range files {
		f.Names = append(f.Names, file.Name())
		// Not Fd(), which would make the socket blocking, for both processes.
		raw, err := file.SyscallConn()
		if err != nil {
			return err
		}
		if err := raw.Control(func(fd uintptr) { fds = append(fds, int(fd)) }); err != nil {
			return err
		}
	}
	body, err := json.Marshal(f)
	if err != nil {
		return err
	}
	head := binary.BigEndian.AppendUint32(nil, uint32(len(body))) //nolint:gosec // 64 names
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	if _, _, err := conn.WriteMsgUnix(head, rights, nil); err != nil {
		return fmt.Errorf("hot restart: send sockets: %w", err)
	}
	_, err = conn.Write(body)
	return err
}

// New is the side that takes.
type New struct{ conn *net.UnixConn }

// Take asks the process that serves path for its sockets. nil = there is none.
func Take(path string) (*New, []*os.File, error) {
	conn, err := net.DialTimeout("unix", path, patience)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, fmt.Errorf("hot restart: %w", err)
	}
	n := &New{conn: conn.(*net.UnixConn)} //nolint:forcetypeassert // what the network "unix" gives
	files, err := n.take()
	if err != nil {
		for _, f := range files {
			err = errors.Join(err, f.Close())
		}
		return nil, nil, errors.Join(fmt.Errorf("hot restart: %w", err), conn.Close())
	}
	return n, files, nil
}

func (n *New) take() ([]*os.File, error) {
	if err := n.conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return nil, err
	}
	if _, err := io.WriteString(n.conn, wordTake); err != nil {
		return nil, err
	}
	var files []*os.File
	for {
		f, got, err := n.frame()
		files = append(files, got...)
		if err != nil {
			return files, err
		}
		if f.Last {
			return files, n.conn.SetDeadline(time.Time{})
		}
	}
}

func (n *New) frame() (f frame, files []*os.File, err error) {
	head := make([]byte, 4)
	rights := make([]byte, unix.CmsgSpace(perFrame*4))
	// The descriptors come with the first byte of the head, which no other message shares.
	read, oob, _, _, err := n.conn.ReadMsgUnix(head, rights)
	if err != nil {
		return frame{}, nil, err
	}
	fds, err := parseRights(rights[:oob])
	if err == nil {
		_, err = io.ReadFull(n.conn, head[read:])
	}
	length := binary.BigEndian.Uint32(head)
	if err == nil && length > maxFrame {
		err = fmt.Errorf("a message of %d bytes", length)
	}
	if err == nil {
		body := make([]byte, length)
		if _, err = io.ReadFull(n.conn, body); err == nil {
			err = json.Unmarshal(body, &f)
		}
	}
	if err == nil && len(f.Names) != len(fds) {
		err = fmt.Errorf("%d sockets came, %d were named", len(fds), len(f.Names))
	}
	for i, fd := range fds {
		name := "inherited"
		if i < len(f.Names) {
			name = f.Names[i]
		}
		files = append(files, os.NewFile(uintptr(fd), name))
	}
	return f, files, err
}

func parseRights(b []byte) ([]int, error) {
	messages, err := unix.ParseSocketControlMessage(b)
	if err != nil {
		return nil, err
	}
	var all []int
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			return all, err
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
		}
		all = append(all, fds...)
	}
	return all, nil
}

// Ready tells the old process that this one serves, and waits until it has let go.
func (n *New) Ready() error {
	if err := n.conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return fmt.Errorf("hot restart: %w", err)
	}
	if _, err := io.WriteString(n.conn, wordReady); err != nil {
		return fmt.Errorf("hot restart: %w", err)
	}
	if err := expect(n.conn, wordReleased); err != nil {
		return fmt.Errorf("hot restart: the old process does not let go: %w", err)
	}
	return n.conn.Close()
}

// Close gives up: the old process goes on.
func (n *New) Close() error { return n.conn.Close() }
