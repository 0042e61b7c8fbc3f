// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/lab/internal/ledger"
)

// ErrRunning says that a lab of that name is up.
var ErrRunning = errors.New("lab is already up")

// claim makes the lab's folder and locks it; whoever holds the lock owns the lab. The lock ends with the process, however that ends.
func claim(name string) (release func(), err error) {
	dir := RunDir(name)
	for {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("claim lab %s: %w", name, err)
		}
		file, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
		if errors.Is(err, os.ErrNotExist) {
			// The folder was removed by its last owner in between.
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("claim lab %s: %w", name, err)
		}
		if err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			file.Close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				return nil, fmt.Errorf("%s: %w", name, ErrRunning)
			}
			return nil, fmt.Errorf("claim lab %s: %w", name, err)
		}
		// A lock on a file that its last owner has removed since it was opened is worth nothing.
		var held, named unix.Stat_t
		if unix.Fstat(int(file.Fd()), &held) == nil && unix.Stat(file.Name(), &named) == nil && held.Ino == named.Ino && held.Dev == named.Dev {
			return func() { file.Close() }, nil
		}
		file.Close()
	}
}

// cleanDeadline bounds the removal of a lab.
const cleanDeadline = 30 * time.Second

// clean removes whatever the ledger of a lab lists, then its folder. The caller holds the lock.
func clean(name string) error {
	ctx, cancel := context.WithTimeout(context.Background(), cleanDeadline)
	defer cancel()
	l, err := ledger.Read(ledgerPath(name))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err == nil {
		if err := l.Clean(ctx); err != nil {
			return fmt.Errorf("clean lab %s: %w", name, err)
		}
	}
	if err := os.RemoveAll(RunDir(name)); err != nil {
		return fmt.Errorf("clean lab %s: %w", name, err)
	}
	if err := os.Remove(runRoot); err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ENOTEMPTY) {
		return fmt.Errorf("clean lab %s: %w", name, err)
	}
	return nil
}

// Clean removes what a lab left whose supervisor is gone. It reports whether there was anything; a lab that is up is ErrRunning.
func Clean(name string) (found bool, err error) {
	if err := CheckName(name); err != nil {
		return false, err
	}
	if _, err := os.Stat(RunDir(name)); errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	release, err := claim(name)
	if err != nil {
		return true, err
	}
	defer release()
	return true, clean(name)
}

// Supervisor returns whether the process that owns a lab still runs; a lab without one has none.
func Supervisor(name string) (alive func() bool) {
	l, err := ledger.Read(ledgerPath(name))
	if err != nil {
		return func() bool { return false }
	}
	return l.State().Supervisor.Alive
}
