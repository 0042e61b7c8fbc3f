// SPDX-License-Identifier: Apache-2.0

package timeval

import (
	"testing"
	"time"
)

func TestParse(t *testing.T) {
	now := time.Date(2024, 5, 6, 7, 8, 9, 123456789, time.UTC)
	east := time.FixedZone("east", 2*3600)
	tests := []struct {
		in   string
		loc  *time.Location
		want string // RFC3339Nano in UTC; empty = error
	}{
		{"5m", time.UTC, "2024-05-06T07:03:09.123456789Z"},
		{"1h30m", time.UTC, "2024-05-06T05:38:09.123456789Z"},
		{"1d", time.UTC, "2024-05-05T07:08:09.123456789Z"},
		{"1.5d", time.UTC, "2024-05-04T19:08:09.123456789Z"},
		{"1d12h", time.UTC, "2024-05-04T19:08:09.123456789Z"},
		{"-1h", time.UTC, "2024-05-06T08:08:09.123456789Z"},
		{"-1d1h", time.UTC, "2024-05-07T08:08:09.123456789Z"},
		{"2024-05-06", time.UTC, "2024-05-06T00:00:00Z"},
		{"2024-05-06", east, "2024-05-05T22:00:00Z"},
		{"2024-05-06T07Z", time.UTC, "2024-05-06T07:00:00Z"},
		{"2024-05-06T07+02:00", time.UTC, "2024-05-06T05:00:00Z"},
		{"2024-05-06T07:08Z", time.UTC, "2024-05-06T07:08:00Z"},
		{"2024-05-06T07:08:09Z", time.UTC, "2024-05-06T07:08:09Z"},
		{"2024-05-06T07:08:09.123Z", time.UTC, "2024-05-06T07:08:09.123Z"},
		{"2024-05-06T07:08:09.123456789+01:00", time.UTC, "2024-05-06T06:08:09.123456789Z"},
		{"Mon, 06 May 2024 07:08:09 +0000", time.UTC, "2024-05-06T07:08:09Z"},
		// The layout that our own output has, which Hubble's help promises and its parser refuses.
		{"May  6 07:08:09.123", time.UTC, "2024-05-06T07:08:09.123Z"},
		{"May 6 07:08:09", time.UTC, "2024-05-06T07:08:09Z"},
		{"May  6 07:08:09.123", east, "2024-05-06T05:08:09.123Z"},
		{"Dec 31 23:59:59.999", time.UTC, "2023-12-31T23:59:59.999Z"},
		{"Feb 29 00:00:00.000", time.UTC, "2024-02-29T00:00:00Z"},
		{"", time.UTC, ""},
		{"d", time.UTC, ""},
		{"1", time.UTC, ""},
		{"0x1d", time.UTC, ""},
		{"1d-1h", time.UTC, ""},
		{"1e300d", time.UTC, ""},
		{"999999999d", time.UTC, ""},
		{"yesterday", time.UTC, ""},
		{"2024-13-01", time.UTC, ""},
	}
	for _, tt := range tests {
		got, err := Parse(tt.in, now, tt.loc)
		if tt.want == "" {
			if err == nil {
				t.Errorf("Parse(%q) = %v, want an error", tt.in, got)
			} else if want := "failed to convert " + tt.in + " to time"; err.Error() != want {
				t.Errorf("Parse(%q): error %q, want %q", tt.in, err, want)
			}
			continue
		}
		if err != nil {
			t.Errorf("Parse(%q): %v", tt.in, err)
			continue
		}
		if s := got.UTC().Format(time.RFC3339Nano); s != tt.want {
			t.Errorf("Parse(%q) in %v = %s, want %s", tt.in, tt.loc, s, tt.want)
		}
	}
}

func TestParseStampAcrossNewYear(t *testing.T) {
	now := time.Date(2025, 1, 1, 0, 0, 5, 0, time.UTC)
	for in, want := range map[string]string{
		"Dec 31 23:59:59.000": "2024-12-31T23:59:59Z",
		"Jan  1 00:00:04.000": "2025-01-01T00:00:04Z",
		"Feb 29 12:00:00.000": "2024-02-29T12:00:00Z",
	} {
		got, err := Parse(in, now, time.UTC)
		if err != nil || got.Format(time.RFC3339Nano) != want {
			t.Errorf("Parse(%q) = %v, %v, want %s", in, got, err, want)
		}
	}
}

func TestLayout(t *testing.T) {
	at := time.Date(2024, 5, 6, 7, 8, 9, 123456789, time.UTC)
	for name, want := range map[string]string{
		"StampMilli":             "May  6 07:08:09.123",
		"yearmonthday":           "2024-05-06",
		"YEARMONTHDAYHOUR":       "2024-05-06T07Z",
		"YearMonthDayHourMinute": "2024-05-06T07:08Z",
		"RFC3339":                "2024-05-06T07:08:09Z",
		"RFC3339Milli":           "2024-05-06T07:08:09.123Z",
		"RFC3339Micro":           "2024-05-06T07:08:09.123456Z",
		"RFC3339Nano":            "2024-05-06T07:08:09.123456789Z",
		"rfc1123z":               "Mon, 06 May 2024 07:08:09 +0000",
	} {
		layout, ok := Layout(name)
		if got := at.Format(layout); !ok || got != want {
			t.Errorf("layout %s: %q, %v, want %q", name, got, ok, want)
		}
	}
	if layout, ok := Layout("nonsense"); ok || layout != time.StampMilli {
		t.Errorf("unknown name: %q, %v", layout, ok)
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"5m", "1d", "1.5d3h", "-1d", "May  6 07:08:09.123", "2024-05-06T07Z", "Feb 29 00:00:00", "1e9d", "Mon, 06 May 2024 07:08:09 +0000"} {
		f.Add(s)
	}
	now := time.Date(2024, 5, 6, 7, 8, 9, 0, time.UTC)
	f.Fuzz(func(t *testing.T, s string) {
		got, err := Parse(s, now, time.UTC)
		if err != nil && !got.IsZero() {
			t.Fatalf("Parse(%q) = %v with error %v", s, got, err)
		}
		// A plain duration must mean what it means to package time.
		if d, derr := time.ParseDuration(s); derr == nil {
			if err != nil || !got.Equal(now.Add(-d)) {
				t.Fatalf("Parse(%q) = %v, %v, want now-%v", s, got, err, d)
			}
		}
	})
}
