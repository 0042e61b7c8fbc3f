// SPDX-License-Identifier: Apache-2.0

package allocator

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/weirmesh/weir/internal/labelset"
)

// Keys: n.<number> claims a number for a set; l.<hash> links sets to their numbers.
const (
	numberPrefix = "n."
	linkPrefix   = "l."
)

func numberKey(number uint32) string { return numberPrefix + strconv.FormatUint(uint64(number), 10) }

func linkKey(hash string) string { return linkPrefix + hash }

// parseNumberKey reads what numberKey wrote.
func parseNumberKey(key string) (uint32, bool) {
	text, ok := strings.CutPrefix(key, numberPrefix)
	if !ok {
		return 0, false
	}
	n, err := strconv.ParseUint(text, 10, 32)
	return uint32(n), err == nil && numberKey(uint32(n)) == key
}

// hashLabels is the hash of sets in production. Collisions are handled, not hoped against.
func hashLabels(set labelset.Set) string {
	sum := sha256.Sum256([]byte(set.Key()))
	return hex.EncodeToString(sum[:16])
}

// claim is the value of n.<number>.
type claim struct {
	Labels labelset.Set `json:"labels"`
}

// link is the value of l.<hash>: every set with that hash, and its number.
type link struct {
	Entries []linkEntry `json:"entries"`
}

// linkEntry is one set. Released is when it went out of use; zero = it is in use.
type linkEntry struct {
	Number   uint32       `json:"number"`
	Labels   labelset.Set `json:"labels"`
	Released time.Time    `json:"released,omitzero"`
}

func (l link) find(set labelset.Set) (linkEntry, bool) {
	i := slices.IndexFunc(l.Entries, func(e linkEntry) bool { return e.Labels.Equal(set) })
	if i < 0 {
		return linkEntry{}, false
	}
	return l.Entries[i], true
}

// with returns the link with an entry added or replaced.
func (l link) with(entry linkEntry) link {
	return link{Entries: append(l.without(entry.Labels).Entries, entry)}
}

func (l link) without(set labelset.Set) link {
	var kept []linkEntry
	for _, e := range l.Entries {
		if !e.Labels.Equal(set) {
			kept = append(kept, e)
		}
	}
	return link{Entries: kept}
}

// encode cannot fail: the types hold nothing that JSON cannot.
func encode(v any) []byte {
	var b bytes.Buffer
	encoder := json.NewEncoder(&b)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(v); err != nil {
		panic(fmt.Sprintf("encode %T: %v", v, err))
	}
	return bytes.TrimSpace(b.Bytes())
}

func decodeClaim(data []byte) (claim, error) {
	var c claim
	if err := json.Unmarshal(data, &c); err != nil {
		return claim{}, fmt.Errorf("read claim: %w", err)
	}
	if err := c.Labels.Check(); err != nil {
		return claim{}, fmt.Errorf("read claim: %w", err)
	}
	return c, nil
}

func decodeLink(data []byte) (link, error) {
	var l link
	if err := json.Unmarshal(data, &l); err != nil {
		return link{}, fmt.Errorf("read link: %w", err)
	}
	seen := map[string]bool{}
	for _, e := range l.Entries {
		if err := e.Labels.Check(); err != nil {
			return link{}, fmt.Errorf("read link: %w", err)
		}
		if e.Number == 0 {
			return link{}, errors.New("read link: number is 0")
		}
		if seen[e.Labels.Key()] {
			return link{}, fmt.Errorf("read link: %v is there twice", e.Labels)
		}
		seen[e.Labels.Key()] = true
	}
	return l, nil
}
