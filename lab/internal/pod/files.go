// SPDX-License-Identifier: Apache-2.0

package pod

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/weirmesh/weir/lab/internal/launch"
	"github.com/weirmesh/weir/lab/internal/zone"
)

// files are what a workload sees in the place of the machine's own.
type files struct {
	dir       string
	hostname  string
	namespace string // empty = no search list
	dns       netip.Addr
	addresses []netip.Addr
	aliases   []corev1.HostAlias
	fqdn      string
}

// write makes the files.
func (f files) write() error {
	if err := os.MkdirAll(f.dir, 0o755); err != nil {
		return fmt.Errorf("make pod folder: %w", err)
	}
	for name, content := range map[string]string{
		"resolv.conf": f.resolvConf(), "hosts": f.hosts(), "hostname": f.hostname + "\n",
	} {
		// In place: a running container has the file bound, not the name.
		if err := os.WriteFile(filepath.Join(f.dir, name), []byte(content), 0o644); err != nil {
			return fmt.Errorf("write %s: %w", name, err)
		}
	}
	return nil
}

func (f files) resolvConf() string {
	if f.namespace == "" {
		return "# A host outside of the cluster has no name server.\n"
	}
	return fmt.Sprintf("nameserver %s\nsearch %s.svc.%s svc.%s %s\noptions ndots:5\n", f.dns, f.namespace, zone.Domain, zone.Domain, zone.Domain)
}

func (f files) hosts() string {
	var b strings.Builder
	b.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n")
	for _, address := range f.addresses {
		fmt.Fprintf(&b, "%s\t%s\n", address, strings.TrimSpace(f.fqdn+" "+f.hostname))
	}
	for _, alias := range f.aliases {
		fmt.Fprintf(&b, "%s\t%s\n", alias.IP, strings.Join(alias.Hostnames, " "))
	}
	return b.String()
}

// binds puts the files over those of the machine that exist.
func (f files) binds() ([]launch.Bind, error) {
	var binds []launch.Bind
	for _, name := range []string{"resolv.conf", "hosts", "hostname"} {
		target := filepath.Join("/etc", name)
		if _, err := os.Stat(target); errors.Is(err, os.ErrNotExist) && name == "hostname" {
			continue
		} else if err != nil {
			return nil, fmt.Errorf("a pod's own %s is bound over the machine's, which is missing (an empty file will do): %w", target, err)
		}
		binds = append(binds, launch.Bind{Source: filepath.Join(f.dir, name), Target: target})
	}
	return binds, nil
}
