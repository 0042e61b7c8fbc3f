// SPDX-License-Identifier: Apache-2.0

// Package intake turns messages of the stream into ordered events: it indexes batches, drops what
// came before, orders by time and tells gaps. Live reading and the reading of history use the same
// Pipeline.
package intake

import (
	"log/slog"
	"time"

	"google.golang.org/protobuf/proto"

	flowv1 "github.com/weirmesh/weir/gen/weir/flow/v1"
	"github.com/weirmesh/weir/internal/batch"
	"github.com/weirmesh/weir/services/observer/internal/event"
	"github.com/weirmesh/weir/services/observer/internal/merge"
	"github.com/weirmesh/weir/services/observer/internal/sequence"
)

// Message is one message of the stream.
type Message struct {
	// Seq is its place in the stream.
	Seq uint64
	// Time is when JetStream stored it, Unix nanoseconds.
	Time int64
	Data []byte
}

// Sink receives what comes out, in order.
type Sink interface {
	// Record takes record i of a batch: a flow or an agent event.
	Record(source *event.Source, i int)
	// Gap takes a gap; it may be kept.
	Gap(gap *event.Gap)
}

// Observer is told of batches as they come in, before ordering. It may be nil.
type Observer interface {
	Batch(source *event.Source, fresh int)
}

// Config is how a pipeline orders and how patient it is.
type Config struct {
	Merge merge.Config
	// Patience is how long a hole in the numbers may stay before it is a gap.
	Patience time.Duration
	// FromStart says that the first message read is the first that the stream ever had.
	FromStart bool
}

// Counters count what a pipeline met. The owner of the pipeline reads them.
type Counters struct {
	Batches    uint64 // readable ones
	Duplicates uint64 // of these, with nothing new
	Unreadable uint64 // messages without a readable header: what they held shows as holes
	Bytes      uint64
}

// Pipeline is not safe for concurrent use.
type Pipeline struct {
	tracker  *sequence.Tracker
	merger   *merge.Merger
	sink     Sink
	observer Observer
	log      *slog.Logger
	last     uint64
	now      int64
	counters Counters
}

// New makes a pipeline.
func New(config Config, sink Sink, observer Observer, log *slog.Logger) *Pipeline {
	return &Pipeline{
		tracker:  sequence.New(config.Patience, config.FromStart),
		merger:   merge.New(config.Merge),
		sink:     sink,
		observer: observer,
		log:      log,
	}
}

// Tracker returns what is known of the numbers.
func (p *Pipeline) Tracker() *sequence.Tracker { return p.tracker }

// Counters returns what was met so far.
func (p *Pipeline) Counters() Counters { return p.counters }

// Last returns the place of the last message.
func (p *Pipeline) Last() uint64 { return p.last }

// Now returns the stream's clock: the latest time given.
func (p *Pipeline) Now() int64 { return p.now }

// Message takes the next message of the stream. The data is kept.
func (p *Pipeline) Message(m Message) {
	p.now = max(p.now, m.Time)
	// First what the clock alone decides, so that a pause in the reading changes nothing.
	p.advance()
	if p.last != 0 && m.Seq > p.last+1 {
		p.tracker.Skipped()
	}
	p.last = m.Seq
	p.counters.Bytes += uint64(len(m.Data))
	b, err := batch.Parse(m.Data)
	if err != nil {
		p.damaged(m, err)
		return
	}
	p.counters.Batches++
	spans, gaps := p.tracker.Add(&b.Header, p.now)
	p.tell(gaps)
	if len(spans) == 0 {
		p.counters.Duplicates++
		return
	}
	source := event.NewSource(b, m.Seq, m.Time)
	if p.observer != nil {
		fresh := 0
		for _, s := range spans {
			fresh += s.To - s.From
		}
		p.observer.Batch(source, fresh)
	}
	p.merger.Add(source, spans, m.Seq)
	p.merger.Emit(p.now, p.record)
}

// Tick moves the stream's clock while no message comes. When the stream can not be reached, frozen,
// records are handed on all the same, but nobody loses patience with holes.
func (p *Pipeline) Tick(now int64, frozen bool) {
	if now <= p.now {
		return
	}
	if frozen {
		p.merger.Emit(now, p.record)
		return
	}
	p.now = now
	p.advance()
}

// Restarted says that the stream was made anew and its places begin again.
func (p *Pipeline) Restarted() { p.last = 0 }

// Flush hands on all that waits.
func (p *Pipeline) Flush() { p.merger.Flush(p.record) }

func (p *Pipeline) advance() {
	p.merger.Emit(p.now, p.record)
	p.tell(p.tracker.Due(p.now))
}

func (p *Pipeline) damaged(m Message, err error) {
	p.log.Error("a batch in the stream is damaged", "stream_seq", m.Seq, "error", err)
	h, _, headerErr := batch.ParseHeader(m.Data)
	if headerErr != nil {
		p.counters.Unreadable++
		return
	}
	p.tell(p.tracker.Damaged(&h, p.now))
}

func (p *Pipeline) record(source *event.Source, i int) {
	if source.Kind(i) != batch.Loss {
		p.sink.Record(source, i)
		return
	}
	loss := &flowv1.Loss{}
	if err := proto.Unmarshal(source.Item(i), loss); err != nil {
		p.log.Error("a loss record is unreadable", "node", source.NodeName, "batch", source.ID(), "error", err)
		loss = &flowv1.Loss{Place: flowv1.Place_PLACE_AGENT, Cause: flowv1.Cause_CAUSE_INVALID, Count: 1}
	}
	p.tell(p.tracker.Loss(&source.Header, loss, source.Time(i), p.now))
}

func (p *Pipeline) tell(gaps []event.Gap) {
	for i := range gaps {
		g := gaps[i]
		g.StreamSeq = p.last
		p.sink.Gap(&g)
	}
}

// Cut returns how many records were handed on before their time.
func (p *Pipeline) Cut() uint64 { return p.merger.Cut() }
