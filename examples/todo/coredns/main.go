// SPDX-License-Identifier: Apache-2.0

// Command coredns is the real CoreDNS with the few plugins that the sample cluster needs.
//
// The stock binary carries every cloud provider's client; this one is built from the same module with the plugins of the sample's Corefile.
package main

import (
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/coremain"

	_ "github.com/coredns/coredns/plugin/cache"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/file"
	_ "github.com/coredns/coredns/plugin/forward"
	_ "github.com/coredns/coredns/plugin/health"
	_ "github.com/coredns/coredns/plugin/log"
	_ "github.com/coredns/coredns/plugin/reload"
)

func main() {
	// The order in which plugins handle a query, whatever the order in the Corefile.
	dnsserver.Directives = []string{"reload", "health", "errors", "log", "cache", "file", "forward"}
	coremain.Run()
}
