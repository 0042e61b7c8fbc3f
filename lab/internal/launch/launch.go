// SPDX-License-Identifier: Apache-2.0

// Package launch puts the calling process into a pod's place (control group, network, mount and UTS namespaces, files of its own) and
// becomes the program that is to run there. It is the only way in which the lab starts anything, and how `exec` enters a container:
// since the process itself turns into the program, terminal, signals and exit code need no help.
package launch

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Exit codes as shells use them.
const (
	ExitNotFound = 127
	ExitFailed   = 126
)

// SpecFD is where a started process finds its Spec as JSON, to its end.
const SpecFD = 3

// argument is how Command tells the program that it starts what is wanted of it.
const argument = "run-in"

// Intercept turns this process into the program of a launch, if Command started it for that, and does not return; else it does nothing.
// The first call of a main (weir-lab's, or a test's that stands in for it).
func Intercept() {
	if len(os.Args) != 2 || os.Args[1] != argument {
		return
	}
	spec, err := ReadSpec()
	if err == nil {
		err = spec.Run()
	}
	fmt.Fprintln(os.Stderr, "weir-lab: run-in:", err)
	os.Exit(ExitCode(err))
}

// Spec describes a process to start.
type Spec struct {
	// Netns is the path of the network namespace; empty = the caller's.
	Netns string `json:"netns,omitempty"`
	// Cgroup is the folder of the control group to join; empty = stay.
	Cgroup string `json:"cgroup,omitempty"`
	// Hostname, when given, gets the process a UTS namespace of its own.
	Hostname string `json:"hostname,omitempty"`
	// Binds, when given, get the process a mount namespace of its own, with these files in place of the machine's.
	Binds []Bind `json:"binds,omitempty"`
	// Dir is the working folder; empty = /.
	Dir string `json:"dir,omitempty"`
	// Args has the program first. A name without a slash is looked up in the PATH of Env.
	Args []string `json:"args"`
	// Env is the whole environment.
	Env []string `json:"env"`
}

// Bind puts a file or folder in the place of another.
type Bind struct {
	Source string `json:"source"`
	Target string `json:"target"`
}

// ErrNotFound says that the program does not exist.
var ErrNotFound = errors.New("no such program")

// LookPath finds a program as the process will: a name with a slash as it is, another in path (as in $PATH).
func LookPath(name, path string) (string, error) {
	if strings.Contains(name, "/") {
		return name, executable(name)
	}
	for _, dir := range filepath.SplitList(path) {
		candidate := filepath.Join(dir, name)
		if executable(candidate) == nil {
			return candidate, nil
		}
	}
	return "", fmt.Errorf("%s: %w in %s", name, ErrNotFound, path)
}

func executable(path string) error {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("%s: %w", path, ErrNotFound)
	case err != nil:
		return fmt.Errorf("%s: %w", path, err)
	case info.IsDir() || info.Mode()&0o111 == 0:
		return fmt.Errorf("%s: not executable", path)
	}
	return nil
}

// Command prepares a child that is going to be what spec says, started by this program's own `run-in`. The caller sets its standard
// files and may append to ExtraFiles: those follow SpecFD, and the program inherits them. done releases what the start needed, and is called
// after Start, whether it worked or not.
func Command(self string, spec Spec) (command *exec.Cmd, done func(), err error) {
	data, err := json.Marshal(spec)
	if err != nil {
		return nil, nil, fmt.Errorf("encode launch: %w", err)
	}
	fd, err := unix.MemfdCreate("weir-lab-launch", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, nil, fmt.Errorf("make launch file: %w", err)
	}
	file := os.NewFile(uintptr(fd), "launch")
	if _, err := file.Write(data); err != nil {
		file.Close()
		return nil, nil, fmt.Errorf("write launch file: %w", err)
	}
	command = exec.Command(self, argument)
	command.Env = []string{}
	command.ExtraFiles = []*os.File{file}
	return command, func() { file.Close() }, nil
}

// ReadSpec reads what Command wrote.
func ReadSpec() (Spec, error) {
	file := os.NewFile(SpecFD, "launch")
	if file == nil {
		return Spec{}, errors.New("read launch: no such file descriptor")
	}
	defer file.Close()
	var spec Spec
	// The descriptor shares its position with the writer's, which is at the end.
	if err := json.NewDecoder(io.NewSectionReader(file, 0, 1<<30)).Decode(&spec); err != nil {
		return Spec{}, fmt.Errorf("read launch: %w", err)
	}
	return spec, nil
}

// Run turns this process into the program. It returns only when that failed.
func (s Spec) Run() error {
	if len(s.Args) == 0 {
		return errors.New("launch: no program")
	}
	// Namespaces belong to threads; exec makes the calling thread the whole process.
	runtime.LockOSThread()
	if err := s.enter(); err != nil {
		return err
	}
	dir := s.Dir
	if dir == "" {
		dir = "/"
	}
	if err := unix.Chdir(dir); err != nil {
		return fmt.Errorf("enter working folder %s: %w", dir, err)
	}
	program, err := LookPath(s.Args[0], environ(s.Env, "PATH"))
	if err != nil {
		return err
	}
	if err := unix.Exec(program, s.Args, s.Env); err != nil {
		return fmt.Errorf("exec %s: %w", program, err)
	}
	return nil
}

// enter moves the calling thread.
func (s Spec) enter() error {
	if s.Cgroup != "" {
		pid := strconv.Itoa(os.Getpid())
		if err := os.WriteFile(filepath.Join(s.Cgroup, "cgroup.procs"), []byte(pid), 0o644); err != nil {
			return fmt.Errorf("join control group: %w", err)
		}
	}
	if s.Netns != "" {
		fd, err := unix.Open(s.Netns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open network namespace %s: %w", s.Netns, err)
		}
		defer unix.Close(fd)
		if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace %s: %w", s.Netns, err)
		}
	}
	if s.Hostname != "" {
		if err := unix.Unshare(unix.CLONE_NEWUTS); err != nil {
			return fmt.Errorf("new UTS namespace: %w", err)
		}
		if err := unix.Sethostname([]byte(s.Hostname)); err != nil {
			return fmt.Errorf("set host name: %w", err)
		}
	}
	if len(s.Binds) == 0 {
		return nil
	}
	// A mount namespace needs a thread that shares its root and working folder with no other; Go's threads do.
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("new mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	for _, bind := range s.Binds {
		if err := unix.Mount(bind.Source, bind.Target, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("put %s over %s: %w", bind.Source, bind.Target, err)
		}
	}
	return nil
}

// environ returns the value of a variable, the last one given.
func environ(env []string, name string) string {
	for i := len(env) - 1; i >= 0; i-- {
		if value, ok := strings.CutPrefix(env[i], name+"="); ok {
			return value
		}
	}
	return ""
}

// ExitCode returns the code that a shell would give for a failure of Run.
func ExitCode(err error) int {
	if errors.Is(err, ErrNotFound) {
		return ExitNotFound
	}
	return ExitFailed
}
