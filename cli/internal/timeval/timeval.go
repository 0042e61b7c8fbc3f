// SPDX-License-Identifier: Apache-2.0

// Package timeval reads the times that people type after --since and --until,
// and knows the layouts of --time-format.
package timeval

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// Layouts of --time-format that package time does not name.
const (
	yearMonthDay           = "2006-01-02"
	yearMonthDayHour       = "2006-01-02T15Z07:00"
	yearMonthDayHourMinute = "2006-01-02T15:04Z07:00"
	rfc3339Milli           = "2006-01-02T15:04:05.999Z07:00"
	rfc3339Micro           = "2006-01-02T15:04:05.999999Z07:00"
)

// Format is a named layout.
type Format struct {
	Name, Layout string
}

// Formats lists the values of --time-format in the order of the help text.
func Formats() []Format {
	return []Format{
		{"StampMilli", time.StampMilli},
		{"YearMonthDay", yearMonthDay},
		{"YearMonthDayHour", yearMonthDayHour},
		{"YearMonthDayHourMinute", yearMonthDayHourMinute},
		{"RFC3339", time.RFC3339},
		{"RFC3339Milli", rfc3339Milli},
		{"RFC3339Micro", rfc3339Micro},
		{"RFC3339Nano", time.RFC3339Nano},
		{"RFC1123Z", time.RFC1123Z},
	}
}

// Layout returns the layout of a format's name in any case. An unknown name
// gives the default, StampMilli, and false.
func Layout(name string) (string, bool) {
	for _, f := range Formats() {
		if strings.EqualFold(f.Name, name) {
			return f.Layout, true
		}
	}
	return time.StampMilli, false
}

// Parse reads a time in the past relative to now (5m, 1h30m, 2d, 1d12h) or an
// absolute one in any layout of Formats. A layout without zone is read as in
// loc; one without year (StampMilli) means its latest occurrence that is not
// more than a day ahead of now.
func Parse(s string, now time.Time, loc *time.Location) (time.Time, error) {
	if d, err := parseDuration(s); err == nil {
		return now.Add(-d), nil
	}
	for _, f := range Formats() {
		if f.Layout == time.StampMilli {
			continue
		}
		if t, err := time.ParseInLocation(f.Layout, s, loc); err == nil {
			return t, nil
		}
	}
	if t, ok := parseStamp(s, now, loc); ok {
		return t, nil
	}
	return time.Time{}, fmt.Errorf("failed to convert %s to time", s)
}

// parseStamp reads "Jan _2 15:04:05", with or without fraction. The year is
// the newest that does not put the time into the future; a day's grace is
// for clocks and zones.
func parseStamp(s string, now time.Time, loc *time.Location) (time.Time, bool) {
	// The year is parsed along, so that Feb 29 is accepted only in years that have one.
	year := now.In(loc).AddDate(0, 0, 1).Year()
	for y := year; y > year-9; y-- {
		t, err := time.ParseInLocation("2006 "+time.Stamp, strconv.Itoa(y)+" "+s, loc)
		if err == nil && !t.After(now.Add(24*time.Hour)) {
			return t, true
		}
	}
	return time.Time{}, false
}

// parseDuration is time.ParseDuration with days as a leading unit.
func parseDuration(s string) (time.Duration, error) {
	days, rest, ok := strings.Cut(s, "d")
	if !ok {
		return time.ParseDuration(s)
	}
	n, err := strconv.ParseFloat(days, 64)
	// ParseFloat reads more than decimals (hexadecimal, Inf, underscores): those are no durations.
	if err != nil || strings.Trim(days, "+-.0123456789") != "" {
		return 0, errors.New("invalid number of days")
	}
	d := n * float64(24*time.Hour)
	if math.Abs(d) > math.MaxInt64/2 {
		return 0, errors.New("duration out of range")
	}
	if rest == "" {
		return time.Duration(d), nil
	}
	if strings.ContainsAny(rest, "+-") {
		return 0, errors.New("sign inside a duration")
	}
	r, err := time.ParseDuration(rest)
	if err != nil {
		return 0, err
	}
	if d < 0 || strings.HasPrefix(days, "-") {
		r = -r
	}
	if sum := d + float64(r); math.Abs(sum) > math.MaxInt64/2 {
		return 0, errors.New("duration out of range")
	}
	return time.Duration(d) + r, nil
}
