// SPDX-License-Identifier: Apache-2.0

package zone

import (
	"context"
	"fmt"
	"os"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/weirmesh/weir/lab/internal/cluster"
)

// Writer keeps a zone file in line with a cluster.
type Writer struct {
	cluster *cluster.Cluster
	path    string
	serial  uint32
	last    string
}

// NewWriter writes the zone to path for the first time.
func NewWriter(c *cluster.Cluster, path string) (*Writer, error) {
	// A serial that begins with the time rises also from one lab to the next.
	w := &Writer{cluster: c, path: path, serial: uint32(time.Now().Unix())}
	return w, w.write()
}

// Run rewrites the file when objects change, until ctx ends.
func (w *Writer) Run(ctx context.Context) error {
	for {
		if err := w.follow(ctx); err != nil {
			return err
		}
		if ctx.Err() != nil {
			return nil
		}
	}
}

func (w *Writer) follow(ctx context.Context) error {
	watch := w.cluster.Watch("Service", "EndpointSlice", "Pod")
	defer watch.Close()
	for {
		if _, err := watch.Next(ctx); err != nil {
			// Behind or at the end: the caller knows which.
			return nil
		}
		if err := w.write(); err != nil {
			return err
		}
	}
}

func (w *Writer) write() error {
	objects := Objects{
		Services: cluster.List[*corev1.Service](w.cluster),
		Slices:   cluster.List[*discoveryv1.EndpointSlice](w.cluster),
		Pods:     cluster.List[*corev1.Pod](w.cluster),
	}
	if text := Render(0, objects); text == w.last {
		return nil
	} else {
		w.last = text
	}
	w.serial++
	// Replaced, not overwritten: the server may be reading.
	if err := os.WriteFile(w.path+".new", []byte(Render(w.serial, objects)), 0o644); err != nil {
		return fmt.Errorf("write zone: %w", err)
	}
	if err := os.Rename(w.path+".new", w.path); err != nil {
		return fmt.Errorf("write zone: %w", err)
	}
	return nil
}
