// SPDX-License-Identifier: Apache-2.0

package logfile_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/weirmesh/weir/lab/internal/logfile"
)

func open(t *testing.T, max int64) *logfile.File {
	t.Helper()
	f, err := logfile.Open(filepath.Join(t.TempDir(), "sub", "log"), max)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func write(t *testing.T, f *logfile.File, text string) {
	t.Helper()
	if _, err := f.Write([]byte(text)); err != nil {
		t.Fatal(err)
	}
}

func TestTail(t *testing.T) {
	for _, tt := range []struct {
		text string
		n    int
		want string
	}{
		{"", -1, ""}, {"", 3, ""},
		{"a\nb\nc\n", -1, "a\nb\nc\n"}, {"a\nb\nc\n", 0, ""}, {"a\nb\nc\n", 1, "c\n"}, {"a\nb\nc\n", 2, "b\nc\n"}, {"a\nb\nc\n", 9, "a\nb\nc\n"},
		{"a\nb", 1, "b"}, {"a\n\n", 1, "\n"}, {"a\n\n", 2, "a\n\n"},
	} {
		f := open(t, 100)
		write(t, f, tt.text)
		var out bytes.Buffer
		if err := f.Copy(t.Context(), &out, tt.n, false); err != nil || out.String() != tt.want {
			t.Errorf("last %d lines of %q: %q, %v, want %q", tt.n, tt.text, out.String(), err, tt.want)
		}
	}
}

func TestRotation(t *testing.T) {
	f := open(t, 10)
	for i := range 10 {
		write(t, f, fmt.Sprintf("%d234\n", i))
	}
	var out bytes.Buffer
	if err := f.Copy(t.Context(), &out, -1, false); err != nil || out.String() != "6234\n7234\n8234\n9234\n" {
		t.Errorf("%q, %v", out.String(), err)
	}
	for _, name := range []string{f.Path(), f.Path() + ".1"} {
		if info, err := os.Stat(name); err != nil || info.Size() > 10 {
			t.Errorf("%s: %v, %v", name, info.Size(), err)
		}
	}
}

func TestFollow(t *testing.T) {
	f := open(t, 10)
	write(t, f, "first\n")
	reader, writer := io.Pipe()
	done := make(chan error, 1)
	go func() {
		err := f.Copy(t.Context(), writer, -1, true)
		writer.CloseWithError(io.EOF)
		done <- err
	}()
	read := func(n int) string {
		t.Helper()
		b := make([]byte, n)
		if _, err := io.ReadFull(reader, b); err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	if got := read(6); got != "first\n" {
		t.Errorf("%q", got)
	}
	// Across a rotation nothing is missing.
	write(t, f, "second\n")
	if got := read(7); got != "second\n" {
		t.Errorf("%q", got)
	}
	write(t, f, "end\n")
	f.Close()
	rest, err := io.ReadAll(reader)
	if err != nil || string(rest) != "end\n" {
		t.Errorf("%q, %v", rest, err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, err := f.Write([]byte("x")); err == nil {
		t.Error("a closed log was written")
	}
}

func TestFollowEndsWithContext(t *testing.T) {
	f := open(t, 10)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := f.Copy(ctx, &strings.Builder{}, -1, true); err != nil {
		t.Error(err)
	}
}
