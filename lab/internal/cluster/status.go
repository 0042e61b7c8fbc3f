// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/weirmesh/weir/lab/internal/object"
)

// ErrNotFound says that there is no such object, or another one of that name.
var ErrNotFound = errors.New("not found")

// UpdateStatus merges a JSON merge patch (RFC 7396) into an object's status. uid, when not empty, is that of the object that is meant. The
// generation stays, and a patch that changes nothing is no event, as in an API server.
func (c *Cluster) UpdateStatus(key object.Key, uid types.UID, patch json.RawMessage) error {
	var change any
	if err := json.Unmarshal(patch, &change); err != nil {
		return fmt.Errorf("status of %s: not a JSON merge patch: %w", key, err)
	}
	if _, ok := change.(map[string]any); !ok && change != nil {
		return fmt.Errorf("status of %s: expected an object as patch, got %.40s", key, patch)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	current, ok := c.objects[key]
	if !ok || uid != "" && current.GetUID() != uid {
		return fmt.Errorf("%s: %w", key, ErrNotFound)
	}
	before, err := object.StatusOf(current)
	if err != nil {
		return err
	}
	var status any
	if len(before) > 0 {
		if err := json.Unmarshal(before, &status); err != nil {
			return fmt.Errorf("status of %s: %w", key, err)
		}
	}
	after, err := encodeStatus(merge(status, change))
	if err != nil {
		return fmt.Errorf("status of %s: %w", key, err)
	}
	changed, err := object.SetStatus(current, after)
	if err != nil {
		return err
	}
	// As the kind has it: a field that it does not know is no change.
	if kept, err := object.StatusOf(changed); err != nil || sameJSON(kept, before) {
		return err
	}
	c.put(changed)
	if _, raw := changed.(*object.Raw); !raw {
		c.reconcile()
	}
	return nil
}

// encodeStatus returns a status as JSON; nil for none.
func encodeStatus(status any) (json.RawMessage, error) {
	if status == nil {
		return nil, nil
	}
	return json.Marshal(status)
}

// merge is the algorithm of RFC 7396.
func merge(target, patch any) any {
	change, ok := patch.(map[string]any)
	if !ok {
		return patch
	}
	result, ok := target.(map[string]any)
	if !ok {
		result = map[string]any{}
	}
	for name, value := range change {
		if value == nil {
			delete(result, name)
			continue
		}
		result[name] = merge(result[name], value)
	}
	return result
}

// lease is who may act alone, and until when.
type lease struct {
	holder string
	until  time.Time
}

// maxLease bounds a lease, so that a holder that is gone does not keep the others out for long.
const maxLease = 300 * time.Second

// AcquireLease takes or renews a lease for holder, unless somebody else has it, and returns who has it.
func (c *Cluster) AcquireLease(name, holder string, d time.Duration) (string, error) {
	if name == "" || holder == "" || d < time.Second || d > maxLease {
		return "", fmt.Errorf("lease %q: expected a name, a holder and 1 to %.0f seconds, got holder %q and %s", name, maxLease.Seconds(), holder, d)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.config.Now()
	if current, ok := c.leases[name]; ok && current.holder != holder && now.Before(current.until) {
		return current.holder, nil
	}
	c.leases[name] = lease{holder: holder, until: now.Add(d)}
	return holder, nil
}
