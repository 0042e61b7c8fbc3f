// SPDX-License-Identifier: Apache-2.0

// Package folder keeps a cluster in line with folders of manifest files: what a file has is applied, what it no longer has is deleted. A
// file that cannot be used is reported, and what it last said stays in force.
package folder

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/weirmesh/weir/lab/internal/cluster"
	"github.com/weirmesh/weir/lab/internal/manifest"
	"github.com/weirmesh/weir/lab/internal/object"
)

// period is how often files are looked at.
const period = time.Second

// Read parses all manifests of files and folders. The error joins all faults of all files.
func Read(paths []string) ([]manifest.Item, error) {
	files, err := List(paths)
	if err != nil {
		return nil, err
	}
	var items []manifest.Item
	var errs []error
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			errs = append(errs, fmt.Errorf("read manifests: %w", err))
			continue
		}
		parsed, err := manifest.Parse(file, data)
		errs = append(errs, err)
		items = append(items, parsed...)
	}
	return items, errors.Join(errs...)
}

// List returns the files that paths name: themselves, or in folders and below those that end in .yaml, .yml or .json.
func List(paths []string) ([]string, error) {
	var files []string
	for _, path := range paths {
		info, err := os.Stat(path)
		if err != nil {
			return nil, fmt.Errorf("read manifests: %w", err)
		}
		if !info.IsDir() {
			files = append(files, path)
			continue
		}
		err = filepath.WalkDir(path, func(path string, entry fs.DirEntry, err error) error {
			if err == nil && !entry.IsDir() && slices.Contains([]string{".yaml", ".yml", ".json"}, filepath.Ext(path)) &&
				!strings.HasPrefix(entry.Name(), ".") {
				files = append(files, path)
			}
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("read manifests: %w", err)
		}
	}
	slices.Sort(files)
	return slices.Compact(files), nil
}

// Follower applies changes of files.
type Follower struct {
	paths   []string
	cluster *cluster.Cluster
	log     *slog.Logger

	files map[string]*file

	mu     sync.Mutex
	faults map[string]string
}

type file struct {
	hash [sha256.Size]byte
	keys []object.Key
}

// NewFollower follows files and folders whose present content was read by Read and applied.
func NewFollower(paths []string, items []manifest.Item, c *cluster.Cluster, log *slog.Logger) (*Follower, error) {
	f := &Follower{paths: paths, cluster: c, log: log.With("component", "manifests"), files: map[string]*file{}, faults: map[string]string{}}
	names, err := List(paths)
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		data, err := os.ReadFile(name)
		if err != nil {
			return nil, fmt.Errorf("read manifests: %w", err)
		}
		f.files[name] = &file{hash: sha256.Sum256(data)}
	}
	for _, item := range items {
		if known := f.files[item.File]; known != nil {
			known.keys = append(known.keys, item.Key())
		}
	}
	return f, nil
}

// Faults returns what is wrong with the files now, by name.
func (f *Follower) Faults() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var faults []string
	for _, name := range slices.Sorted(maps.Keys(f.faults)) {
		faults = append(faults, strings.Split(f.faults[name], "\n")...)
	}
	return faults
}

func (f *Follower) setFault(name string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err == nil {
		delete(f.faults, name)
		return
	}
	f.faults[name] = err.Error()
	f.log.Error("manifest cannot be used, what it last said stays", "file", name, "error", err)
}

// Run looks at the files until ctx ends.
func (f *Follower) Run(ctx context.Context) error {
	ticks := time.NewTicker(period)
	defer ticks.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticks.C:
			f.Look()
		}
	}
}

// Look compares the files with what was last applied, and applies the difference.
func (f *Follower) Look() {
	names, err := List(f.paths)
	f.setFault("", err)
	if err != nil {
		return
	}
	// What a file lost may have moved to another: nothing is deleted before all are applied.
	lost := map[string][]object.Key{}
	for _, name := range names {
		lost[name] = f.lookAt(name)
	}
	for name, known := range f.files {
		if !slices.Contains(names, name) {
			delete(f.files, name)
			f.setFault(name, nil)
			lost[name] = known.keys
		}
	}
	for name, keys := range lost {
		if gone := f.unclaimed(keys); len(gone) > 0 {
			f.report(name, f.cluster.Delete(gone))
		}
	}
}

// lookAt applies a file if it has changed, and returns the objects it had before.
func (f *Follower) lookAt(name string) []object.Key {
	data, err := os.ReadFile(name)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		f.setFault(name, err)
		return nil
	}
	known := f.files[name]
	if known == nil {
		known = &file{}
		f.files[name] = known
	}
	hash := sha256.Sum256(data)
	if hash == known.hash {
		return nil
	}
	known.hash = hash
	items, err := manifest.Parse(name, data)
	var results []string
	if err == nil {
		results, err = f.cluster.Apply(items)
	}
	f.setFault(name, err)
	if err != nil {
		return nil
	}
	f.report(name, results)
	before := known.keys
	known.keys = nil
	for _, item := range items {
		known.keys = append(known.keys, item.Key())
	}
	return before
}

// unclaimed returns those keys that no file has now: an object may move from one file to another.
func (f *Follower) unclaimed(keys []object.Key) []object.Key {
	var gone []object.Key
	for _, key := range keys {
		claimed := false
		for _, known := range f.files {
			claimed = claimed || slices.Contains(known.keys, key)
		}
		if !claimed {
			gone = append(gone, key)
		}
	}
	return gone
}

func (f *Follower) report(name string, results []string) {
	for _, result := range results {
		if !strings.HasSuffix(result, " unchanged") {
			f.log.Info("applied", "file", name, "result", result)
		}
	}
}
