// SPDX-License-Identifier: Apache-2.0

// Package statefile keeps what an agent must find again after it was killed: small files that are versioned, checksummed, readable by
// root alone, and replaced as a whole, so that a reader sees the old content or the new one and never a mixture.
package statefile

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

var (
	// ErrDamaged says that a file's content does not match its checksum, or that it is no state file at all.
	ErrDamaged = errors.New("damaged state file")
	// ErrVersion says that a file was written in a layout that this program does not read.
	ErrVersion = errors.New("unknown layout version")
)

const magic = "weir-state"

// Write replaces the file with payload, as `kind` in layout `version`. It returns after the content is on disk.
func Write(path, kind string, version int, payload []byte) error {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+"-*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer os.Remove(f.Name()) // a no-op once renamed
	sum := sha256.Sum256(payload)
	_, err = fmt.Fprintf(f, "%s %s %d %d %s\n", magic, kind, version, len(payload), hex.EncodeToString(sum[:]))
	if err == nil {
		_, err = f.Write(payload)
	}
	if err == nil {
		err = f.Chmod(0o600)
	}
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err == nil {
		err = syncDir(dir)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// syncDir makes a rename survive a power cut.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Read returns the payload. The error is fs.ErrNotExist, ErrDamaged, ErrVersion or one of the file system.
func Read(path, kind string, version int) ([]byte, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	if !info.Mode().IsRegular() || info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("read %s: mode %s, want a file of mode 0600: %w", path, info.Mode(), fs.ErrPermission)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	payload, err := Decode(b, kind, version)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return payload, nil
}

// Decode checks the bytes of a state file and returns the payload, which aliases b.
func Decode(b []byte, kind string, version int) ([]byte, error) {
	head, payload, ok := bytes.Cut(b, []byte("\n"))
	if !ok {
		return nil, ErrDamaged
	}
	var gotMagic, gotKind, gotSum string
	var gotVersion, size int
	if _, err := fmt.Sscanf(string(head), "%s %s %d %d %s", &gotMagic, &gotKind, &gotVersion, &size, &gotSum); err != nil || gotMagic != magic {
		return nil, ErrDamaged
	}
	if gotKind != kind {
		return nil, fmt.Errorf("holds %q, want %q: %w", gotKind, kind, ErrDamaged)
	}
	if gotVersion != version {
		return nil, fmt.Errorf("layout %d, want %d: %w", gotVersion, version, ErrVersion)
	}
	sum := sha256.Sum256(payload)
	if size != len(payload) || gotSum != hex.EncodeToString(sum[:]) {
		return nil, ErrDamaged
	}
	return payload, nil
}
