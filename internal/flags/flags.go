// SPDX-License-Identifier: Apache-2.0

// Package flags is the command line that all services of Weir have in common, and how the
// environment fills what the command line left out.
package flags

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"

	"github.com/spf13/pflag"

	"github.com/weirmesh/weir/internal/spiffe"
)

// Common are the options of every service.
type Common struct {
	// Listen is the TCP address of the gRPC port with mutual TLS; empty = none.
	Listen string
	// Socket is the path of the unix socket for status and local calls; empty = none.
	Socket string
	// MetricsListen is the TCP address of plain /metrics, /healthz and /readyz; empty = none.
	MetricsListen string
	// TLS are this part's certificate, key and trust bundle.
	TLS spiffe.Files
	// LogLevel is debug, info, warn or error; default info.
	LogLevel string
	// ClusterName is the name of this cluster in labels and flows; default "default".
	ClusterName string
}

// Default returns the defaults of a service that listens on an address.
func Default(listen string) Common {
	return Common{Listen: listen, LogLevel: "info", ClusterName: "default"}
}

// Add adds the flags; the values that c holds are their defaults.
func (c *Common) Add(set *pflag.FlagSet) {
	set.StringVar(&c.Listen, "listen", c.Listen, "TCP `address` of the gRPC port (mutual TLS)")
	set.StringVar(&c.Socket, "socket", c.Socket, "`path` of the unix socket for status and local calls; empty = none")
	set.StringVar(&c.MetricsListen, "metrics-listen", c.MetricsListen, "TCP `address` of plain HTTP /metrics, /healthz and /readyz; empty = none")
	set.StringVar(&c.TLS.Cert, "tls-cert", c.TLS.Cert, "`file` with this part's certificate (PEM)")
	set.StringVar(&c.TLS.Key, "tls-key", c.TLS.Key, "`file` with its key (PEM)")
	set.StringVar(&c.TLS.CA, "tls-ca", c.TLS.CA, "`file` with the trusted CA certificates (PEM)")
	set.StringVar(&c.LogLevel, "log-level", c.LogLevel, "debug, info, warn or error")
	set.StringVar(&c.ClusterName, "cluster-name", c.ClusterName, "`name` of this cluster")
}

// Validate reports all faults joined.
func (c *Common) Validate() error {
	var errs []error
	if _, err := level(c.LogLevel); err != nil {
		errs = append(errs, err)
	}
	if c.ClusterName == "" {
		errs = append(errs, errors.New("cluster-name is empty"))
	}
	return errors.Join(errs...)
}

// Parse reads the command line, then fills each flag that it did not set from the environment:
// --metrics-listen from WEIR_METRICS_LISTEN. lookup is os.LookupEnv. Arguments that are no flags
// are an error.
func Parse(set *pflag.FlagSet, args []string, lookup func(string) (string, bool)) error {
	if err := set.Parse(args); err != nil {
		return err
	}
	if set.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", set.Arg(0))
	}
	var errs []error
	set.VisitAll(func(f *pflag.Flag) {
		if f.Changed {
			return
		}
		name := EnvName(f.Name)
		value, ok := lookup(name)
		if !ok {
			return
		}
		if err := set.Set(f.Name, value); err != nil {
			errs = append(errs, fmt.Errorf("environment %s: %w", name, err))
		}
	})
	return errors.Join(errs...)
}

// EnvName returns the environment variable of a flag.
func EnvName(flag string) string {
	return "WEIR_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// Logger makes the logger of a process: text, to w, of a level.
func Logger(w io.Writer, levelName string) (*slog.Logger, error) {
	l, err := level(levelName)
	if err != nil {
		return nil, err
	}
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: l})), nil
}

func level(name string) (slog.Level, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(name)); err != nil {
		return 0, fmt.Errorf("log-level %q is not debug, info, warn or error", name)
	}
	return l, nil
}
