// SPDX-License-Identifier: Apache-2.0

package selection

import (
	"math"
	"reflect"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"
)

var (
	now  = time.Date(2024, 5, 6, 7, 8, 9, 0, time.UTC)
	ago5 = now.Add(-5 * time.Minute)
	ago1 = now.Add(-time.Minute)
)

func TestPlans(t *testing.T) {
	type planner func(Flags, time.Time, *time.Location) (Plan, error)
	server, file, events := planner(Flags.ForServer), planner(Flags.ForFile), planner(Flags.ForEvents)
	since, until := timestamppb.New(ago5), timestamppb.New(ago1)
	tests := []struct {
		name string
		plan planner
		in   Flags
		want Plan
	}{
		{"nothing", server, Flags{}, Plan{Number: 20}},
		{"follow", server, Flags{Follow: true}, Plan{Follow: true}},
		{"follow last", server, Flags{Follow: true, Last: 5}, Plan{Follow: true, Number: 5}},
		{"since", server, Flags{Since: "5m"}, Plan{Since: since}},
		{"newest since", server, Flags{Since: "5m", Last: 3}, Plan{Number: 3, NotBefore: ago5}},
		{"newest since, then follow", server, Flags{Since: "5m", Last: 3, Follow: true}, Plan{Number: 3, NotBefore: ago5, Follow: true}},
		{"newest until", server, Flags{Until: "1m", Last: 3}, Plan{Until: until, Tail: 3}},
		{"newest of a window", server, Flags{Since: "5m", Until: "1m", Last: 3}, Plan{Since: since, Until: until, Tail: 3}},
		{"first", server, Flags{First: 5}, Plan{Number: 5, First: true}},
		{"first since", server, Flags{First: 5, Since: "5m"}, Plan{Number: 5, First: true, Since: since}},
		{"all", server, Flags{All: true}, Plan{Number: math.MaxUint64}},
		{"all since", server, Flags{All: true, Since: "5m"}, Plan{Since: since}},
		{"until is dropped with follow", server, Flags{Until: "1m", Follow: true}, Plan{Follow: true}},
		{"file", file, Flags{}, Plan{}},
		{"file last", file, Flags{Last: 3, Since: "5m"}, Plan{Since: since, Tail: 3}},
		{"file first", file, Flags{First: 3}, Plan{Number: 3, First: true}},
		{"events", events, Flags{}, Plan{Number: 20}},
		{"events follow", events, Flags{Follow: true}, Plan{Number: 20, Follow: true}},
		{"events follow all", events, Flags{Follow: true, All: true}, Plan{Number: math.MaxUint64, Follow: true}},
		{"events follow since", events, Flags{Follow: true, Since: "5m"}, Plan{Since: since, Follow: true}},
		{"events first", events, Flags{First: 2}, Plan{Number: 2, First: true}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := tt.plan(tt.in, now, time.UTC)
			if err != nil || !reflect.DeepEqual(got, tt.want) {
				t.Errorf("got %+v, %v\nwant %+v", got, err, tt.want)
			}
		})
	}
}

func TestErrors(t *testing.T) {
	for want, in := range map[string]Flags{
		"cannot set both --first and --last":                           {First: 1, Last: 1},
		"cannot set both --first and --all":                            {First: 1, All: true},
		"cannot set both --first and --follow":                         {First: 1, Follow: true},
		"cannot set both --last and --all":                             {Last: 1, All: true},
		"failed to parse the since time: failed to convert x to time":  {Since: "x"},
		"failed to parse the until time: failed to convert x to time":  {Until: "x"},
		"--last must be <= 1000000 together with --until, got 1000001": {Until: "1m", Last: 1000001},
	} {
		if _, err := in.ForServer(now, time.UTC); err == nil || err.Error() != want {
			t.Errorf("%+v: %v, want %s", in, err, want)
		}
	}
	if _, err := (Flags{Last: 1000001}).ForFile(now, time.UTC); err == nil || err.Error() != "--last must be <= 1000000, got 1000001" {
		t.Error(err)
	}
}
