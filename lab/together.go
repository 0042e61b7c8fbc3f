// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"errors"
	"path/filepath"

	"github.com/weirmesh/weir/lab/internal/central"
	"github.com/weirmesh/weir/lab/internal/launch"
	"github.com/weirmesh/weir/lab/internal/part"
)

// together are all central services in one process.
func (l *Lab) together() ([]part.Definition, error) {
	var errs []error
	var sockets []string
	service := func(name string, port int) central.Service {
		files, err := l.certs.issue(name, "")
		errs = append(errs, err)
		s := central.Service{Socket: l.runPath(name + ".sock"), TLS: files}
		if port != 0 {
			s.Listen = hostPort(l.config.central(1), port)
		}
		sockets = append(sockets, s.Socket)
		return s
	}
	config := central.Config{
		LogLevel: l.config.LogLevel, ClusterName: l.config.ClusterName, PolicyArgs: l.config.PolicyArgs, IdentityArgs: l.config.IdentityArgs,
		XDSArgs: l.config.XDSArgs,
		NATS:    service("nats", natsPort), StoreDir: filepath.Join(l.stateDir(), "nats"), NATSURL: l.config.natsURL(),
		Identity: service("identity", identityPort),
		Policy:   service("policy", policyPort), Source: l.config.sourceAddress(),
		XDS:      service("xds", xdsPort),
		Relay:    service("relay", relayPort),
		Observer: service("observer", 0), ObserverFD: launch.SpecFD + 1,
	}
	path := l.runPath("central.json")
	if err := errors.Join(append(errs, config.Write(path))...); err != nil {
		return nil, err
	}
	definition := l.process("central", l.config.centralNetns(), []string{l.config.Self, "central", "--config", path}, sockets...)
	definition.Files = l.observerListener
	return []part.Definition{definition}, nil
}
