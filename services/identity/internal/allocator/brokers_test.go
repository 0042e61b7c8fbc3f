// SPDX-License-Identifier: Apache-2.0

package allocator_test

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/weirmesh/weir/internal/labelset"
	"github.com/weirmesh/weir/services/identity/internal/allocator"
)

// seed prints what a random test is repeated with: WEIR_TEST_SEED.
func seed(t *testing.T) *rand.Rand {
	t.Helper()
	n := uint64(time.Now().UnixNano())
	if text := os.Getenv("WEIR_TEST_SEED"); text != "" {
		var err error
		if n, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("seed: WEIR_TEST_SEED=%d", n)
	return rand.New(rand.NewPCG(n, n))
}

func numberedSet(i int) labelset.Set {
	return labelset.Set{
		fmt.Sprintf("k8s:app=app-%d", i),
		"k8s:io.cilium.k8s.policy.cluster=default",
		"k8s:io.kubernetes.pod.namespace=ns-" + strconv.Itoa(i%17),
	}
}

// answers records what brokers said, and fails the test at the first contradiction.
type answers struct {
	t        *testing.T
	mu       sync.Mutex
	bySet    map[string]uint32
	byNumber map[uint32]string
}

func newAnswers(t *testing.T) *answers {
	return &answers{t: t, bySet: map[string]uint32{}, byNumber: map[uint32]string{}}
}

func (a *answers) add(set labelset.Set, number uint32) {
	a.mu.Lock()
	defer a.mu.Unlock()
	key := set.Key()
	if n, ok := a.bySet[key]; ok && n != number {
		a.t.Errorf("set %v has numbers %d and %d", set, n, number)
	}
	if s, ok := a.byNumber[number]; ok && s != key {
		a.t.Errorf("number %d means %q and %q", number, s, key)
	}
	a.bySet[key], a.byNumber[number] = number, key
}

// sameEverywhere checks that all brokers list exactly the identities answered, and get each alike.
func (a *answers) sameEverywhere(brokers ...*broker) {
	a.t.Helper()
	for i, b := range brokers {
		all, err := b.List(within(a.t, time.Minute))
		if err != nil {
			a.t.Fatalf("broker %d: %v", i, err)
		}
		if len(all) != len(a.bySet) {
			a.t.Errorf("broker %d lists %d identities, want %d", i, len(all), len(a.bySet))
		}
		for _, id := range all {
			if n, ok := a.bySet[id.Labels.Key()]; !ok || n != id.Number {
				a.t.Errorf("broker %d lists %d for %v, want %d", i, id.Number, id.Labels, n)
			}
		}
	}
}

// noLeftovers checks that the bucket holds one claim and one link entry per identity and no more.
func noLeftovers(t *testing.T, b *broker, identities int) {
	t.Helper()
	claims, entries := 0, 0
	b.EachKey(func(claim bool, n int) {
		if claim {
			claims++
		}
		entries += n
	})
	if claims != identities || entries != identities {
		t.Errorf("the bucket holds %d claims and %d link entries, want %d of each", claims, entries, identities)
	}
}

var errCrash = errors.New("killed between the two claims")

// retry asks until a broker answers: NATS may be away, or the broker may just have been killed.
func retry(ctx context.Context, pick func() *broker, set labelset.Set) (uint32, error) {
	for {
		callCtx, cancel := context.WithTimeout(ctx, 2*time.Second)
		number, err := pick().Allocate(callCtx, set)
		cancel()
		if err == nil || ctx.Err() != nil {
			return number, err
		}
	}
}

// TestManyBrokers is the identity test of the issue: three brokers, 10,000 label sets asked of all
// of them in random orders, hashes that collide, brokers that want the same numbers, brokers killed
// between the two claims, NATS killed with SIGKILL in between. SIGKILL does not prove durability:
// what the server wrote stays in the page cache.
func TestManyBrokers(t *testing.T) {
	const sets, workers = 10_000, 8
	random := seed(t)
	server := startNATS(t)

	config := testConfig()
	// 2,500 hashes for 10,000 sets; and every broker tries the same numbers.
	config.Hash = func(s labelset.Set) string {
		h := fnv.New64a()
		h.Write([]byte(s.Key()))
		return strconv.FormatUint(h.Sum64()%2500, 36)
	}
	config.OrphanGrace = 0
	var crashes atomic.Int64
	crashRandom := rand.New(rand.NewPCG(random.Uint64(), 1))
	var crashMu sync.Mutex
	config.Claimed = func(labelset.Set, uint32) error {
		crashMu.Lock()
		defer crashMu.Unlock()
		if crashRandom.IntN(200) == 0 {
			crashes.Add(1)
			return errCrash
		}
		return nil
	}

	var mu sync.Mutex
	brokers := make([]*broker, 3)
	for i := range brokers {
		brokers[i] = startBroker(t, server.url, config)
	}
	replace := func(i int) { // a broker dies for good and another takes its place
		mu.Lock()
		old := brokers[i]
		mu.Unlock()
		old.kill()
		fresh := startBroker(t, server.url, config)
		mu.Lock()
		brokers[i] = fresh
		mu.Unlock()
	}

	// Each set is asked of each broker, at some time; every tenth of all three at once as well.
	type ask struct {
		brokers []int
		set     int
	}
	asks := make([]ask, 0, 4*sets)
	for i := range sets {
		for b := range brokers {
			asks = append(asks, ask{[]int{b}, i})
		}
		if i%10 == 0 {
			asks = append(asks, ask{[]int{0, 1, 2}, i})
		}
	}
	random.Shuffle(len(asks), func(i, j int) { asks[i], asks[j] = asks[j], asks[i] })
	queue := make(chan ask)
	said := newAnswers(t)
	ctx := within(t, 5*time.Minute)
	var work sync.WaitGroup
	answer := func(set, b int) {
		number, err := retry(ctx, func() *broker {
			mu.Lock()
			defer mu.Unlock()
			return brokers[b]
		}, numberedSet(set))
		if err != nil {
			t.Errorf("set %d at broker %d: %v", set, b, err)
			return
		}
		said.add(numberedSet(set), number)
	}
	for range workers {
		work.Go(func() {
			for q := range queue {
				var once sync.WaitGroup
				for _, b := range q.brokers {
					once.Go(func() { answer(q.set, b) })
				}
				once.Wait()
			}
		})
	}
	for i, q := range asks {
		select {
		case queue <- q:
		case <-ctx.Done():
			t.Fatal("the brokers did not answer in time")
		}
		switch i {
		case len(asks) / 4:
			replace(0)
		case len(asks) / 2:
			server.kill()
			server.start()
		case 3 * len(asks) / 4:
			replace(1)
		}
	}
	close(queue)
	work.Wait()
	if t.Failed() {
		return
	}
	if len(said.bySet) != sets {
		t.Fatalf("%d sets have numbers, want %d", len(said.bySet), sets)
	}
	lost := uint64(0)
	for i, b := range brokers {
		s := b.Stats()
		lost += s.Lost
		t.Logf("broker %d: allocated %d, lost races %d, number collisions %d", i, s.Allocated, s.Lost, s.Collisions)
		if s.Collisions == 0 {
			t.Errorf("broker %d met no number collision: the test does not force them", i)
		}
	}
	if lost == 0 {
		t.Error("no broker came second for a set: the test does not force it")
	}
	if crashes.Load() == 0 {
		t.Error("no broker died between the two claims: the test does not force it")
	}
	t.Logf("%d deaths between the two claims", crashes.Load())

	for _, b := range brokers {
		if err := b.Collect(within(t, time.Minute)); err != nil {
			t.Fatal(err)
		}
	}
	said.sameEverywhere(brokers...)
	noLeftovers(t, brokers[0], sets)
	for _, i := range random.Perm(sets)[:200] {
		set := numberedSet(i)
		for _, b := range brokers {
			got, err := b.Get(ctx, said.bySet[set.Key()])
			if err != nil || !got.Equal(set) {
				t.Fatalf("Get(%d) = %v, %v; want %v", said.bySet[set.Key()], got, err, set)
			}
		}
	}
}

// TestChurn runs allocation, release and collection against each other, without rest, so that
// numbers go round as fast as they can. A number answered while its holder has it in use must not
// be answered for another set in that time.
func TestChurn(t *testing.T) {
	random := seed(t)
	server := startNATS(t)
	config := testConfig()
	config.Min, config.Max = 256, 400
	config.Rest, config.ReleaseWait, config.OrphanGrace, config.Forget = 0, 0, 0, time.Hour
	config.Hash = func(s labelset.Set) string { return strconv.Itoa(len(s[0]) % 3) }
	config.Claimed = func(_ labelset.Set, number uint32) error {
		if number%23 == 0 {
			return errCrash
		}
		return nil
	}
	brokers := []*broker{startBroker(t, server.url, config), startBroker(t, server.url, config), startBroker(t, server.url, config)}

	// A set in use by a worker is used by it alone: it is the only one to release it.
	var mu sync.Mutex
	holder := map[uint32]string{}
	ctx := within(t, 2*time.Minute)
	stop := make(chan struct{})
	var collectors sync.WaitGroup
	for _, b := range brokers {
		collectors.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if err := b.Collect(ctx); err != nil {
					t.Errorf("collect: %v", err)
					return
				}
			}
		})
	}
	var work sync.WaitGroup
	for w := range 6 {
		r := rand.New(rand.NewPCG(random.Uint64(), uint64(w)))
		work.Go(func() {
			for range 150 {
				set := numberedSet(w*10 + r.IntN(10))
				number, err := retry(ctx, func() *broker { return brokers[r.IntN(3)] }, set)
				if err != nil {
					t.Errorf("allocate: %v", err)
					return
				}
				mu.Lock()
				if other, taken := holder[number]; taken {
					t.Errorf("number %d of %v is in use by %s", number, set, other)
				}
				holder[number] = set.Key()
				mu.Unlock()
				again, err := retry(ctx, func() *broker { return brokers[r.IntN(3)] }, set)
				if err != nil || again != number {
					t.Errorf("set %v has %d, then %d (%v)", set, number, again, err)
				}
				mu.Lock()
				delete(holder, number)
				mu.Unlock()
				if err := brokers[r.IntN(3)].Release(ctx, set); err != nil {
					t.Errorf("release: %v", err)
					return
				}
			}
		})
	}
	work.Wait()
	close(stop)
	collectors.Wait()
	for range 2 {
		for _, b := range brokers {
			if err := b.Collect(ctx); err != nil {
				t.Fatal(err)
			}
		}
	}
	noLeftovers(t, brokers[0], 0)
}

// TestSleeperIsFenced: a broker sleeps between its two claims until its claim was collected and the
// number given to another set. When it wakes, its set must get another number.
func TestSleeperIsFenced(t *testing.T) {
	server := startNATS(t)
	slow := testConfig()
	slow.OrphanGrace, slow.Rest = 0, 0
	asleep, wake := make(chan uint32, 1), make(chan struct{})
	var once sync.Once
	slow.Claimed = func(_ labelset.Set, number uint32) error {
		once.Do(func() {
			asleep <- number
			<-wake
		})
		return nil
	}
	quick := testConfig()
	quick.OrphanGrace, quick.Rest = 0, 0
	sleeper, other := startBroker(t, server.url, slow), startBroker(t, server.url, quick)
	ctx := within(t, time.Minute)

	result := make(chan uint32, 1)
	go func() {
		number, err := sleeper.Allocate(ctx, numberedSet(1))
		if err != nil {
			t.Errorf("sleeper: %v", err)
		}
		result <- number
	}()
	claimed := <-asleep
	if err := other.Collect(ctx); err != nil {
		t.Fatal(err)
	}
	noLeftovers(t, other, 0)
	// The number that the sleeper believes to own goes to another set.
	var number uint32
	for i := 2; number != claimed; i++ {
		if i > 10 {
			t.Fatalf("number %d was not given again", claimed)
		}
		var err error
		if number, err = other.Allocate(ctx, numberedSet(i)); err != nil {
			t.Fatal(err)
		}
		other.SetCursor(claimed - 1)
	}
	close(wake)
	if got := <-result; got == claimed {
		t.Errorf("number %d means two sets", claimed)
	}
}

// TestReleasedSetKeepsNumber: asked for again before the wait ends, also at another broker.
func TestReleasedSetKeepsNumber(t *testing.T) {
	server := startNATS(t)
	var skew atomic.Int64
	config := testConfig()
	config.Now = func() time.Time { return time.Now().Add(time.Duration(skew.Load())) }
	a, b := startBroker(t, server.url, config), startBroker(t, server.url, config)
	ctx := within(t, time.Minute)
	set := numberedSet(1)
	first, err := a.Allocate(ctx, set)
	if err != nil {
		t.Fatal(err)
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(a.Release(ctx, set))
	must(b.Release(ctx, set)) // twice is once
	skew.Add(int64(config.ReleaseWait) - int64(time.Minute))
	must(a.Collect(ctx))
	again, err := b.Allocate(ctx, set)
	must(err)
	if again != first {
		t.Errorf("number was %d, is %d after a release taken back", first, again)
	}
	skew.Add(int64(2 * config.ReleaseWait))
	must(a.Collect(ctx)) // the release was taken back: nothing is due
	if again, err = a.Allocate(ctx, set); err != nil || again != first {
		t.Errorf("number was %d, is %d (%v)", first, again, err)
	}

	// Released for good: the number is gone, rests, and is given again only after that.
	must(a.Release(ctx, set))
	skew.Add(int64(config.ReleaseWait))
	must(b.Collect(ctx))
	if _, err := a.Get(ctx, first); !errors.Is(err, allocator.ErrNotFound) {
		t.Errorf("Get of a collected number: %v", err)
	}
	noLeftovers(t, a, 0)
	b.SetCursor(first - 1)
	second, err := b.Allocate(ctx, set)
	must(err)
	if second == first {
		t.Errorf("number %d did not rest", first)
	}
	skew.Add(int64(config.Rest))
	b.SetCursor(first - 1)
	third, err := b.Allocate(ctx, numberedSet(2))
	must(err)
	if third != first {
		t.Errorf("number %d was not given again after its rest, but %d", first, third)
	}
}

// TestExhausted: no number left is its own error, and ends when one is free.
func TestExhausted(t *testing.T) {
	server := startNATS(t)
	config := testConfig()
	config.Min, config.Max = 256, 258
	config.Rest, config.ReleaseWait = 0, 0
	b := startBroker(t, server.url, config)
	ctx := within(t, time.Minute)
	for i := range 3 {
		if _, err := b.Allocate(ctx, numberedSet(i)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := b.Allocate(ctx, numberedSet(3)); !errors.Is(err, allocator.ErrExhausted) {
		t.Errorf("fourth set of three numbers: %v", err)
	}
	if err := b.Release(ctx, numberedSet(0)); err != nil {
		t.Fatal(err)
	}
	if err := b.Collect(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Allocate(ctx, numberedSet(3)); err != nil {
		t.Errorf("after a release: %v", err)
	}
}

// TestForget: deletions are dropped from the bucket when nothing needs them any more.
func TestForget(t *testing.T) {
	server := startNATS(t)
	var skew atomic.Int64
	config := testConfig()
	config.ReleaseWait = 0
	config.Now = func() time.Time { return time.Now().Add(time.Duration(skew.Load())) }
	b := startBroker(t, server.url, config)
	ctx := within(t, time.Minute)
	if _, err := b.Allocate(ctx, numberedSet(1)); err != nil {
		t.Fatal(err)
	}
	if err := b.Release(ctx, numberedSet(1)); err != nil {
		t.Fatal(err)
	}
	if err := b.Collect(ctx); err != nil {
		t.Fatal(err)
	}
	if got := b.Stats().Resting; got != 1 {
		// The view follows the writes: bring it up to date first.
		if _, err := b.List(ctx); err != nil {
			t.Fatal(err)
		}
		if got = b.Stats().Resting; got != 1 {
			t.Errorf("%d numbers rest, want 1", got)
		}
	}
	skew.Add(int64(config.Rest + config.Forget))
	if err := b.Collect(ctx); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"n.256", "l." + config.Hash(numberedSet(1))} {
		e, err := b.keys.Get(ctx, key)
		if err != nil || e.Revision != 0 {
			t.Errorf("%s is still %+v (%v)", key, e, err)
		}
	}
	if n, err := b.Allocate(ctx, numberedSet(1)); err != nil || n == 0 {
		t.Errorf("allocate after all was forgotten: %d, %v", n, err)
	}
}
