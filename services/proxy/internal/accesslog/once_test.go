// SPDX-License-Identifier: Apache-2.0

package accesslog_test

import (
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	datav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"

	"github.com/weirmesh/weir/services/proxy/internal/accesslog"
	"github.com/weirmesh/weir/services/proxy/internal/model"
)

// Flush intervals: one that no test lives to see, and one that comes soon.
const waits, soon = "3600s", "0.01s"

// atOnce is a batch's size that any entry fills.
const atOnce = 1

// every compiles a logger with a flush interval, and room for a message.
func (r *rig) every(t testing.TB, flush string, batch int) model.Logger {
	t.Helper()
	text := strings.Replace(config, `"0.01s"`, fmt.Sprintf(`%q,"buffer_size_bytes":%d`, flush, batch), 1)
	l, err := r.service.Compile("test", []*accesslogv3.AccessLog{parse(t, text)})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// begun is a request that has begun, end what it becomes.
func begun(path string) *model.Entry {
	e := entry()
	e.Begin, e.Path, e.Denied, e.Flags, e.Details, e.Status = true, path, false, nil, "", 0
	e.ResponseHeaders, e.RequestBytes, e.ResponseBytes = nil, 0, 0
	return e
}

func end(e *model.Entry) *model.Entry {
	e.Begin, e.Status, e.RequestBytes, e.ResponseBytes, e.Attempts = false, 200, 300, 70000, 1
	e.ResponseHeaders = http.Header{"Server": {"x"}}
	return e
}

// told lists the entries as `type path`.
func (s *sink) told() string {
	var all []string
	for _, e := range s.all() {
		kind := "end"
		if e.GetCommonProperties().GetAccessLogType() == datav3.AccessLogType_DownstreamStart {
			kind = "begin"
		}
		all = append(all, kind+" "+e.GetRequest().GetPath())
	}
	return strings.Join(all, ", ")
}

// TestToldOnce: an end that repeats all of a beginning that was not sent yet is told alone, and is what it would be with it.
func TestToldOnce(t *testing.T) {
	r, s := newRig(t, 1<<20), &sink{}
	s.serve(t, r.path)
	l := r.every(t, waits, atOnce)
	e := begun("/a")
	l.Log(e)
	if e.Begun == nil || r.service.Waiting() == 0 {
		t.Error("its beginning takes no room")
	}
	l.Log(end(e))
	if e.Begun != nil {
		t.Errorf("%v is still held", e.Begun)
	}
	l.Log(end(begun("/a")))
	until(t, "two entries", func() bool { return len(s.all()) >= 2 })
	if got := s.told(); got != "end /a, end /a" {
		t.Fatalf("told: %s", got)
	}
	first, second := s.all()[0], s.all()[1]
	if number := first.GetCommonProperties().GetCustomTags()[accesslog.TagSequence]; number != "1" {
		t.Errorf("its number is %q", number)
	}
	first.GetCommonProperties().CustomTags, second.GetCommonProperties().CustomTags = nil, nil
	if !proto.Equal(first, second) {
		t.Errorf("after its beginning: %v\nalone: %v", first, second)
	}
	until(t, "the room is given back", func() bool { return r.service.Waiting() == 0 })
}

// TestToldTwice: a beginning goes out before its end when its time is over, and when the end says something else of the request.
func TestToldTwice(t *testing.T) {
	changes := map[string]func(*model.Entry){
		"a header": func(e *model.Entry) { e.RequestHeaders["X-Canary"] = []string{"false"} },
		"the path": func(e *model.Entry) { e.RequestHeaders["X-Envoy-Original-Path"] = []string{"/a"} },
		"verdict":  func(e *model.Entry) { e.Denied = true },
		"policy":   func(e *model.Entry) { e.Policy = "other" },
		"cluster":  func(e *model.Entry) { e.Cluster = "other" },
		"route":    func(e *model.Entry) { e.Route = "other" },
	}
	for name, change := range changes {
		t.Run(name, func(t *testing.T) {
			r, s := newRig(t, 1<<20), &sink{}
			s.serve(t, r.path)
			l := r.every(t, waits, atOnce)
			e := begun("/a")
			l.Log(e)
			change(e)
			l.Log(end(e))
			until(t, "beginning and end", func() bool { return s.told() == "begin /a, end /a" })
		})
	}
	t.Run("time", func(t *testing.T) {
		r, s := newRig(t, 1<<20), &sink{}
		s.serve(t, r.path)
		l := r.every(t, soon, 1<<20)
		e := begun("/a")
		l.Log(e)
		until(t, "the beginning", func() bool { return s.told() == "begin /a" })
		l.Log(end(e))
		until(t, "the end", func() bool { return s.told() == "begin /a, end /a" })
		until(t, "the room is given back", func() bool { return r.service.Waiting() == 0 })
	})
	t.Run("the process ends", func(t *testing.T) {
		r, s := newRig(t, 1<<20), &sink{}
		s.serve(t, r.path)
		l := r.every(t, waits, atOnce)
		l.Log(end(begun("/first")))
		until(t, "a stream", func() bool { return s.told() == "end /first" })
		l.Log(begun("/a"))
		r.end()
		if got := s.told(); got != "end /first, begin /a" {
			t.Errorf("told: %s", got)
		}
	})
}

// TestTwoLogs: of a listener with two logs each is told, whoever keeps the beginning.
func TestTwoLogs(t *testing.T) {
	r, s := newRig(t, 1<<20), &sink{}
	s.serve(t, r.path)
	l, err := r.service.Compile("test", []*accesslogv3.AccessLog{parse(t, config), parse(t, strings.Replace(config, "slot-1", "slot-2", 1))})
	if err != nil {
		t.Fatal(err)
	}
	e := begun("/a")
	l.Log(e)
	l.Log(end(e))
	until(t, "both ends, and one beginning at least", func() bool {
		return strings.Count(s.told(), "end /a") == 2 && strings.Count(s.told(), "begin /a") >= 1
	})
}

// TestEndFindsNoRoom: then the beginning is told, and one entry is lost.
func TestEndFindsNoRoom(t *testing.T) {
	const room = 400
	r, s := newRig(t, room), &sink{}
	l := r.every(t, soon, 1<<20)
	e := begun("/a")
	l.Log(e)
	if r.lost.Load() != 0 {
		t.Fatalf("a beginning does not fit into %d bytes", room)
	}
	e.Details = strings.Repeat("x", room)
	l.Log(end(e))
	if r.lost.Load() != 1 {
		t.Errorf("%d are lost, want 1", r.lost.Load())
	}
	s.serve(t, r.path)
	until(t, "the beginning", func() bool { return s.told() == "begin /a" })
	until(t, "the room is given back", func() bool { return r.service.Waiting() == 0 })
}

// TestMessages: what a server gets at once is bounded, in order and numbered without a hole.
func TestMessages(t *testing.T) {
	r, s := newRig(t, 1<<30), &sink{}
	l := r.every(t, soon, 1<<20)
	const n, large = 2500, 40
	for i := range n {
		e := entry()
		e.Path = "/" + strconv.Itoa(i)
		if i < large {
			e.Details = strings.Repeat("x", 32<<10)
		}
		l.Log(e)
	}
	s.serve(t, r.path)
	until(t, "all entries", func() bool { return len(s.all()) >= n })
	next := 1
	for i, e := range s.all() {
		if want := "/" + strconv.Itoa(i); e.GetRequest().GetPath() != want {
			t.Fatalf("entry %d is %s", i, e.GetRequest().GetPath())
		}
		if number := e.GetCommonProperties().GetCustomTags()[accesslog.TagSequence]; number != "" {
			if number != strconv.Itoa(i+1) {
				t.Fatalf("entry %d has number %s", i, number)
			}
			if i+1-next > 1000 {
				t.Errorf("a message of %d entries", i+1-next)
			}
			next = i + 1
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.entries) != n || s.messages < large/3 {
		t.Errorf("%d of %d entries in %d messages", len(s.entries), n, s.messages)
	}
}

// TestManyRequests: whatever is told at once from many goroutines, with the sender between them, each request has its end once, after its beginning if that
// was told, and what was lost is counted.
func TestManyRequests(t *testing.T) {
	r, s := newRig(t, 64<<10), &sink{}
	s.serve(t, r.path)
	l := r.every(t, "0.001s", 4<<10)
	const workers, each = 8, 500
	var group sync.WaitGroup
	for w := range workers {
		group.Go(func() {
			for i := range each {
				e := begun(fmt.Sprintf("/%d/%d", w, i))
				l.Log(e)
				if i%50 == 0 {
					time.Sleep(2 * time.Millisecond) // some last longer than a beginning waits
				}
				l.Log(end(e))
			}
		})
	}
	group.Wait()
	until(t, "all ends, or that they are lost", func() bool {
		_, ends := s.requests(t)
		return uint64(len(ends))+r.lost.Load() >= workers*each
	})
	until(t, "the room is given back", func() bool { return r.service.Waiting() == 0 })
}

// requests are the paths that begin, and those that end: each once, and in this order.
func (s *sink) requests(t *testing.T) (begins, ends map[string]bool) {
	t.Helper()
	begins, ends = map[string]bool{}, map[string]bool{}
	for _, e := range s.all() {
		path := e.GetRequest().GetPath()
		if e.GetCommonProperties().GetAccessLogType() == datav3.AccessLogType_DownstreamStart {
			if begins[path] || ends[path] {
				t.Fatalf("%s begins again, or after its end", path)
			}
			begins[path] = true
			continue
		}
		if ends[path] {
			t.Fatalf("%s ends twice", path)
		}
		ends[path] = true
	}
	return begins, ends
}

// deaf is a server that does not look into messages.
type deaf struct{}

func (deaf) Marshal(any) (mem.BufferSlice, error)     { return nil, nil }
func (deaf) Unmarshal(_ mem.BufferSlice, _ any) error { return nil }
func (deaf) Name() string                             { return "proto" }

// BenchmarkRequest is what both entries of a request cost, with their way to a server that does not look at them.
func BenchmarkRequest(b *testing.B) {
	r, s := newRig(b, 1<<40), &sink{}
	s.serveWith(b, r.path, grpc.ForceServerCodecV2(deaf{}))
	l := r.every(b, "0.1s", 16<<10)
	e := begun("/cart?id=1")
	e.Policy, e.RequestHeaders = "shop/web/ingress[0]", http.Header{"User-Agent": {"curl/8"}, "Accept": {"*/*"}}
	b.ReportAllocs()
	before := cpuTime(b)
	for b.Loop() {
		e.Begin, e.Status, e.ResponseHeaders = true, 0, nil
		l.Log(e)
		e.Begin, e.Status, e.ResponseBytes = false, 200, 200
		l.Log(e)
	}
	b.ReportMetric(float64((cpuTime(b)-before).Nanoseconds())/float64(b.N), "cpu-ns/op")
	r.end()
}

func cpuTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
