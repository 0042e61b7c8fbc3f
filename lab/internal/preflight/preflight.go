// SPDX-License-Identifier: Apache-2.0

// Package preflight finds out what a machine lacks for a lab, before anything is made.
package preflight

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/lab/internal/cgroup"
)

// BPFFS is where the BPF file system belongs.
const BPFFS = "/sys/fs/bpf"

// Result is what was found.
type Result struct {
	// CgroupRoot is where the version 2 tree is mounted.
	CgroupRoot string
	// MountBPFFS: the BPF file system is not mounted; the lab mounts it.
	MountBPFFS bool
	// Notes name what is missing that has a substitute, and the substitute.
	Notes []string
}

// Check returns what was found; the error joins everything without which no lab can run. programs are Weir's own, by path.
func Check(programs []string) (Result, error) {
	var result Result
	var errs []error
	if os.Geteuid() != 0 {
		errs = append(errs, errors.New("root is required: network namespaces, control groups and eBPF need it; run with sudo"))
	}
	root, err := cgroup.Root()
	if err != nil {
		errs = append(errs, fmt.Errorf("cgroup v2: %w; mount one, such as `mount -t cgroup2 none /sys/fs/cgroup/unified`", err))
	}
	result.CgroupRoot = root
	if root != "" && root != "/sys/fs/cgroup" {
		result.Notes = append(result.Notes, fmt.Sprintf("cgroup v2 is at %s (hybrid machine): the lab uses that tree", root))
	}
	if _, err := os.Stat("/sys/kernel/btf/vmlinux"); err != nil {
		errs = append(errs, errors.New("kernel types (BTF) are missing: /sys/kernel/btf/vmlinux does not exist; a kernel with CONFIG_DEBUG_INFO_BTF is required"))
	}
	mounted, err := isBPFFS(BPFFS)
	switch {
	case err != nil:
		errs = append(errs, fmt.Errorf("BPF file system: %w", err))
	case !mounted:
		result.MountBPFFS = true
		result.Notes = append(result.Notes, "the BPF file system is not mounted at "+BPFFS+": the lab mounts it, and unmounts it at its end when nothing else is in it")
	}
	notes, err := kernel()
	result.Notes = append(result.Notes, notes...)
	errs = append(errs, err, namespaces())
	for _, program := range programs {
		if _, err := exec.LookPath(program); err != nil {
			errs = append(errs, fmt.Errorf("program %s is missing in %s: run `make build`", filepath.Base(program), filepath.Dir(program)))
		}
	}
	return result, errors.Join(errs...)
}

func isBPFFS(path string) (bool, error) {
	var stat unix.Statfs_t
	if err := unix.Statfs(path, &stat); err != nil {
		return false, err
	}
	return stat.Type == unix.BPF_FS_MAGIC, nil
}

// kernel compares the release with what Weir uses.
func kernel() (notes []string, err error) {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return nil, fmt.Errorf("kernel release: %w", err)
	}
	release := unix.ByteSliceToString(name.Release[:])
	for _, need := range []struct {
		major, minor int
		required     bool
		text         string
	}{
		{5, 10, true, "delivery to a pod's own interface (bpf_redirect_peer)"},
		{5, 14, false, "no cgroup.kill: processes are killed one by one"},
		{6, 6, false, "no tcx hooks: the agents use a clsact qdisc instead"},
	} {
		if atLeast(release, need.major, need.minor) {
			continue
		}
		if need.required {
			return notes, fmt.Errorf("kernel %s is too old: %d.%d is required for %s", release, need.major, need.minor, need.text)
		}
		notes = append(notes, fmt.Sprintf("kernel %s is older than %d.%d: %s", release, need.major, need.minor, need.text))
	}
	return notes, nil
}

// atLeast compares a release such as 6.18.44-custom.
func atLeast(release string, major, minor int) bool {
	fields := strings.FieldsFunc(release, func(r rune) bool { return r < '0' || r > '9' })
	if len(fields) < 2 {
		return false
	}
	x, errX := strconv.Atoi(fields[0])
	y, errY := strconv.Atoi(fields[1])
	return errX == nil && errY == nil && (x > major || x == major && y >= minor)
}

// namespaces checks the kinds of namespace that the kernel was built with.
func namespaces() error {
	var errs []error
	for _, kind := range []string{"net", "mnt", "uts"} {
		if _, err := os.Stat("/proc/self/ns/" + kind); err != nil {
			errs = append(errs, fmt.Errorf("the kernel has no %s namespaces", kind))
		}
	}
	return errors.Join(errs...)
}

// MountBPF mounts the BPF file system.
func MountBPF() error {
	if err := unix.Mount("bpf", BPFFS, "bpf", 0, "mode=0700"); err != nil {
		return fmt.Errorf("mount the BPF file system: %w", err)
	}
	return nil
}
