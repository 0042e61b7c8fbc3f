// SPDX-License-Identifier: Apache-2.0

package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/weirmesh/weir/internal/spiffe"
)

// ListenUnix listens on a unix socket that only root and this process's own user can use: mode
// 0600, and every peer's user is asked of the kernel; others are closed at once. A socket that a
// dead process left is removed; one that is served is an error.
func ListenUnix(path string) (net.Listener, error) {
	if err := removeStale(path); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	ln, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("listen on %s: %w", path, err), ln.Close())
	}
	return &unixListener{Listener: ln}, nil
}

// Listen opens what a service serves on: a TCP address, unless the caller brings listeners of its own
// (a process with several network namespaces does), and a unix socket; an empty address or path
// is left out. After an error all are closed, those that were brought too.
func Listen(ctx context.Context, address, socket string, own ...net.Listener) ([]net.Listener, error) {
	listeners := own
	fail := func(err error) ([]net.Listener, error) {
		for _, ln := range listeners {
			err = errors.Join(err, ln.Close())
		}
		return nil, err
	}
	if len(own) == 0 && address != "" {
		ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
		if err != nil {
			return fail(fmt.Errorf("listen: %w", err))
		}
		listeners = append(listeners, ln)
	}
	if socket != "" {
		ln, err := ListenUnix(socket)
		if err != nil {
			return fail(err)
		}
		listeners = append(listeners, ln)
	}
	if len(listeners) == 0 {
		return fail(errors.New("listen: there is nothing to listen on"))
	}
	return listeners, nil
}

func removeStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode()&os.ModeSocket == 0 {
		return errors.New("a file that is no socket is in the way")
	}
	conn, err := net.DialTimeout("unix", path, time.Second)
	switch {
	case err == nil:
		return errors.Join(errors.New("another process serves it"), conn.Close())
	case errors.Is(err, syscall.ECONNREFUSED):
		return os.Remove(path)
	}
	return err
}

type unixListener struct{ net.Listener }

// Accept returns the next connection of an allowed user.
func (l *unixListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if _, err := localPeer(conn); err != nil {
			_ = conn.Close() // nothing was exchanged with it
			continue
		}
		return conn, nil
	}
}

// localPeer asks the kernel who connected, and refuses users other than root and our own.
func localPeer(conn net.Conn) (spiffe.LocalInfo, error) {
	uc, ok := conn.(*net.UnixConn)
	if !ok {
		return spiffe.LocalInfo{}, fmt.Errorf("peer is on %T, not a unix socket", conn)
	}
	raw, err := uc.SyscallConn()
	if err != nil {
		return spiffe.LocalInfo{}, fmt.Errorf("read peer's user: %w", err)
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return spiffe.LocalInfo{}, fmt.Errorf("read peer's user: %w", err)
	}
	if credErr != nil {
		return spiffe.LocalInfo{}, fmt.Errorf("read peer's user: %w", credErr)
	}
	if !allowedUser(cred.Uid, os.Getuid()) {
		return spiffe.LocalInfo{}, fmt.Errorf("user %d may not use this socket", cred.Uid)
	}
	return spiffe.LocalInfo{
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
		UID:            cred.Uid,
		PID:            cred.Pid,
	}, nil
}

func allowedUser(uid uint32, own int) bool { return uid == 0 || int64(uid) == int64(own) }

// UnixCredentials authenticates unix-socket peers by their user: spiffe.PeerID then returns
// ID{Service: "local"}. A Server uses it by itself for its unix listeners.
func UnixCredentials() credentials.TransportCredentials { return unixCredentials{} }

type unixCredentials struct{}

func (unixCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	info, err := localPeer(conn)
	if err != nil {
		return nil, nil, err
	}
	return conn, info, nil
}

func (unixCredentials) ClientHandshake(_ context.Context, _ string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	info, err := localPeer(conn)
	if err != nil {
		return nil, nil, err
	}
	return conn, info, nil
}

func (unixCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "unix"}
}

func (unixCredentials) Clone() credentials.TransportCredentials { return unixCredentials{} }

func (unixCredentials) OverrideServerName(string) error { return nil }

// dispatch chooses the credentials by the kind of connection, so that one server can have both a
// TLS port and a unix socket.
type dispatch struct{ tls *spiffe.Source }

func (d *dispatch) choose(conn net.Conn) credentials.TransportCredentials {
	if _, ok := conn.(*net.UnixConn); ok {
		return UnixCredentials()
	}
	if d.tls != nil {
		return d.tls.ServerCredentials()
	}
	return insecure.NewCredentials()
}

func (d *dispatch) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return d.choose(conn).ServerHandshake(conn)
}

func (d *dispatch) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("these credentials are for servers")
}

func (d *dispatch) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

func (d *dispatch) Clone() credentials.TransportCredentials { c := *d; return &c }

func (d *dispatch) OverrideServerName(string) error { return nil }
