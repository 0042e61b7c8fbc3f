// SPDX-License-Identifier: Apache-2.0

package flood

import (
	"bytes"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/net/http2"
)

// reader is a connection of which only reads matter.
type reader struct {
	net.Conn
	io.Reader
}

func (r reader) Read(p []byte) (int, error) { return r.Reader.Read(p) }

// through reads everything in pieces of a size and tells what was refused.
func through(in []byte, size int, now func() time.Time) (out []byte, causes []string, err error) {
	c := New(reader{Reader: bytes.NewReader(in)}, now, func(cause string) { causes = append(causes, cause) })
	buf := make([]byte, size)
	for {
		n, err := c.Read(buf)
		out = append(out, buf[:n]...)
		if err != nil {
			return out, causes, err
		}
	}
}

func TestFloods(t *testing.T) {
	tests := []struct {
		name  string
		write func(*http2.Framer)
		n     int
		step  time.Duration // between frames
		want  string
	}{
		{"resets", func(f *http2.Framer) { f.WriteRSTStream(1, http2.ErrCodeCancel) }, 201, 0, "rapid-reset"},
		{"few resets", func(f *http2.Framer) { f.WriteRSTStream(1, http2.ErrCodeCancel) }, 200, 0, ""},
		{"resets in time", func(f *http2.Framer) { f.WriteRSTStream(1, http2.ErrCodeCancel) }, 5000, 20 * time.Millisecond, ""},
		{"settings", func(f *http2.Framer) { f.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1}) }, 101, 0, "settings-flood"},
		{"settings acks", func(f *http2.Framer) { f.WriteSettingsAck() }, 1000, 0, ""},
		{"pings", func(f *http2.Framer) { f.WritePing(false, [8]byte{}) }, 5001, 0, "ping-flood"},
		{"ping acks", func(f *http2.Framer) { f.WritePing(true, [8]byte{}) }, 6000, 0, ""},
		{"priority", func(f *http2.Framer) { f.WritePriority(1, http2.PriorityParam{}) }, 1001, 0, "priority-flood"},
		{"empty data", func(f *http2.Framer) { f.WriteData(1, false, nil) }, 501, 0, "empty-frames"},
		{"data", func(f *http2.Framer) { f.WriteData(1, false, []byte("abc")) }, 5000, 0, ""},
		{"unknown frames", func(f *http2.Framer) { f.WriteRawFrame(0xbb, 0, 1, nil) }, 1001, 0, "priority-flood"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var in bytes.Buffer
			in.WriteString(http2.ClientPreface)
			f := http2.NewFramer(&in, nil)
			f.AllowIllegalWrites = true
			for range tt.n {
				tt.write(f)
			}
			clock := time.Unix(1000, 0)
			now := func() time.Time { clock = clock.Add(tt.step); return clock }
			out, causes, err := through(bytes.Clone(in.Bytes()), 7, now)
			if tt.want == "" {
				if !errors.Is(err, io.EOF) || !bytes.Equal(out, in.Bytes()) {
					t.Fatalf("got %d of %d bytes, %v, %v", len(out), in.Len(), causes, err)
				}
				return
			}
			if !errors.Is(err, ErrFlood) || len(causes) != 1 || causes[0] != tt.want {
				t.Fatalf("got %v, %v", causes, err)
			}
		})
	}
}

// FuzzConn: whatever comes passes unchanged, in whichever pieces, until a flood; and the pieces make no difference to what is a flood.
func FuzzConn(f *testing.F) {
	f.Add([]byte(http2.ClientPreface+"\x00\x00\x00\x04\x00\x00\x00\x00\x00"), 1)
	f.Fuzz(func(t *testing.T, in []byte, size int) {
		now := func() time.Time { return time.Unix(1, 0) }
		size = 1 + max(0, size)%64
		out, causes, err := through(in, size, now)
		whole, wholeCauses, wholeErr := through(in, len(in)+1, now)
		if errors.Is(err, io.EOF) && (!bytes.Equal(out, in) || !bytes.Equal(whole, in)) || !errors.Is(err, wholeErr) || len(causes) != len(wholeCauses) {
			t.Fatalf("in pieces of %d: %v %v; whole: %v %v", size, causes, err, wholeCauses, wholeErr)
		}
	})
}
