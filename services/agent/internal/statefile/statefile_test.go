// SPDX-License-Identifier: Apache-2.0

package statefile_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/weirmesh/weir/services/agent/internal/statefile"
)

func TestWriteThenRead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sub", "endpoints")
	for _, want := range [][]byte{[]byte("one"), {}, bytes.Repeat([]byte{0, '\n'}, 5000)} {
		if err := statefile.Write(path, "endpoints", 1, want); err != nil {
			t.Fatal(err)
		}
		got, err := statefile.Read(path, "endpoints", 1)
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("read %d bytes, %v; want %d", len(got), err, len(want))
		}
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v; want 0600", info.Mode(), err)
	}
	left, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(left) != 1 {
		t.Errorf("%d files left, %v; want the state file alone", len(left), err)
	}
}

func TestReadRefuses(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	if err := statefile.Write(path, "endpoints", 1, []byte("payload")); err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name    string
		bytes   []byte
		mode    os.FileMode
		kind    string
		version int
		want    error
	}{
		{"a changed byte", append(bytes.Clone(good[:len(good)-1]), 'X'), 0o600, "endpoints", 1, statefile.ErrDamaged},
		{"cut short", good[:len(good)-1], 0o600, "endpoints", 1, statefile.ErrDamaged},
		{"empty", nil, 0o600, "endpoints", 1, statefile.ErrDamaged},
		{"of another kind", good, 0o600, "policy", 1, statefile.ErrDamaged},
		{"of another layout", good, 0o600, "endpoints", 2, statefile.ErrVersion},
		{"readable by others", good, 0o644, "endpoints", 1, fs.ErrPermission},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := filepath.Join(t.TempDir(), "f")
			if err := os.WriteFile(p, tt.bytes, tt.mode); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(p, tt.mode); err != nil {
				t.Fatal(err)
			}
			if _, err := statefile.Read(p, tt.kind, tt.version); !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
	if _, err := statefile.Read(filepath.Join(dir, "none"), "x", 1); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte("weir-state endpoints 1 0 e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\n"))
	f.Add([]byte("weir-state"))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := statefile.Decode(b, "endpoints", 1)
		if err == nil && !bytes.HasSuffix(b, p) {
			t.Errorf("payload %q is not the end of %q", p, b)
		}
	})
}
