// SPDX-License-Identifier: Apache-2.0

// Package live runs labs: it starts one, applies policies and waits until they are in force, follows its flows, and ends it.
package live

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	labv1 "github.com/weirmesh/weir/gen/weir/lab/v1"
	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
)

// Lab is a running lab. Close it.
type Lab struct {
	Name string
	// Dir is a folder of this lab's runner, for pods' sockets.
	Dir string

	bin     string
	control *grpc.ClientConn
	policy  *grpc.ClientConn
	lab     labv1.LabServiceClient
	queries policyv1.PolicyQueryServiceClient
}

// NewName makes a name that no other lab has.
func NewName() string { return fmt.Sprintf("pc%07x", rand.Uint32()>>4) }

// downTimeout bounds the end of a lab, whatever became of the case.
const downTimeout = 30 * time.Second

// Up starts a lab. Bin is the folder of Weir's programs, dir a folder for the lab's files.
func Up(ctx context.Context, bin, name, dir string, manifests []byte, flags []string) (*Lab, error) {
	l := &Lab{Name: name, Dir: dir, bin: bin}
	file := filepath.Join(dir, "world.yaml")
	if err := os.WriteFile(file, manifests, 0o600); err != nil {
		return nil, fmt.Errorf("start lab: %w", err)
	}
	args := append([]string{"up", "-d", "--name", name, "--manifests", file, "--observer-listen", "127.0.0.1:0", "--timeout", "60s"}, flags...)
	command := exec.CommandContext(ctx, filepath.Join(bin, "weir-lab"), args...)
	var out bytes.Buffer
	command.Stdout, command.Stderr = &out, &out
	if err := command.Run(); err != nil {
		return nil, errors.Join(fmt.Errorf("start lab: weir-lab %s: %w\n%s", strings.Join(args, " "), err, bytes.TrimSpace(out.Bytes())), l.Down())
	}
	if strings.Contains(out.String(), "not ready after") {
		return nil, errors.Join(fmt.Errorf("start lab: %s", bytes.TrimSpace(out.Bytes())), l.Down())
	}
	var err error
	if l.control, err = dial("unix:///run/weir/" + name + "/lab.sock"); err != nil {
		return nil, errors.Join(err, l.Down())
	}
	if l.policy, err = dial("unix:///run/weir/" + name + "/policy.sock"); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	l.lab, l.queries = labv1.NewLabServiceClient(l.control), policyv1.NewPolicyQueryServiceClient(l.policy)
	return l, nil
}

const messageBytes = 64 << 20

func dial(target string) (*grpc.ClientConn, error) {
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(messageBytes)))
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", target, err)
	}
	return conn, nil
}

// Leave closes what is open to the lab, and lets it run.
func (l *Lab) Leave() {
	for _, c := range []*grpc.ClientConn{l.control, l.policy} {
		if c != nil {
			c.Close()
		}
	}
}

// Close ends the lab.
func (l *Lab) Close() error {
	l.Leave()
	return l.Down()
}

// Down takes the lab away, also when it did not come up whole.
func (l *Lab) Down() error {
	ctx, cancel := context.WithTimeout(context.Background(), downTimeout)
	defer cancel()
	if out, err := exec.CommandContext(ctx, filepath.Join(l.bin, "weir-lab"), "down", "--name", l.Name).CombinedOutput(); err != nil {
		return fmt.Errorf("end lab %s: %w\n%s", l.Name, err, bytes.TrimSpace(out))
	}
	return nil
}

// State is what the lab says of itself.
func (l *Lab) State(ctx context.Context) (*labv1.GetLabResponse, error) {
	s, err := l.lab.GetLab(ctx, &labv1.GetLabRequest{})
	if err != nil {
		return nil, fmt.Errorf("state of the lab: %w", err)
	}
	return s, nil
}

// Apply creates or changes objects, all or none.
func (l *Lab) Apply(ctx context.Context, documents ...[]byte) error {
	_, err := l.lab.Apply(ctx, &labv1.ApplyRequest{Files: files(documents)})
	return err
}

// Delete removes objects.
func (l *Lab) Delete(ctx context.Context, documents ...[]byte) error {
	_, err := l.lab.Delete(ctx, &labv1.DeleteRequest{Files: files(documents)})
	return err
}

func files(documents [][]byte) []*labv1.ManifestFile {
	var all []*labv1.ManifestFile
	for _, d := range documents {
		all = append(all, &labv1.ManifestFile{Name: "-", Data: d})
	}
	return all
}

// Logs returns the last lines of the logs of Weir's parts that look like trouble.
func (l *Lab) Logs() string {
	paths, _ := filepath.Glob(filepath.Join("/run/weir", l.Name, "logs", "*.log"))
	var b strings.Builder
	for _, path := range paths {
		data, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(data)) {
			if strings.Contains(line, "ERROR") || strings.Contains(line, "WARN") || strings.Contains(line, "panic") {
				fmt.Fprintf(&b, "%s: %s", filepath.Base(path), line)
			}
		}
	}
	return b.String()
}
