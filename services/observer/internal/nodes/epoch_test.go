// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"reflect"
	"testing"
	"time"

	"github.com/weirmesh/weir/services/observer/internal/event"
)

func TestEpochs(t *testing.T) {
	r := New(time.Minute, time.Now)
	gap := func(epoch, first, last uint64, withdrawn bool) {
		r.Gap(&event.Gap{NodeName: "c/n", Place: 1, Cause: 1, Epoch: epoch, First: first, Last: last, Count: last - first + 1, Withdrawn: withdrawn})
	}
	gap(7, 5, 9, false)
	gap(6, 1, 3, false)
	gap(6, 1, 3, true)
	r.Gap(&event.Gap{NodeName: "c/n", Place: 1, Cause: 1, Count: 12}) // never numbered
	want := []Epoch{{Number: 6, Last: 3}, {Number: 7, Lost: 5, Last: 9}}
	if got := r.Nodes()[0].Epochs; !reflect.DeepEqual(got, want) {
		t.Errorf("epochs %+v, want %+v", got, want)
	}
	for e := uint64(8); e < 40; e++ {
		gap(e, 1, 1, false)
	}
	got := r.Nodes()[0].Epochs
	if len(got) != maxEpochs || got[0].Number != 40-maxEpochs {
		t.Errorf("after many epochs: %d kept, from %d", len(got), got[0].Number)
	}
	gap(1, 1, 1, false)
	if again := r.Nodes()[0].Epochs; !reflect.DeepEqual(again, got) {
		t.Errorf("an old epoch changed what is kept: %+v", again)
	}
}
