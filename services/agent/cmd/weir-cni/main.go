// SPDX-License-Identifier: Apache-2.0

// Command weir-cni is Weir's CNI plugin, spec 1.1: it speaks CNI with the container runtime and asks the node's agent to do the work.
package main

import (
	"github.com/containernetworking/cni/pkg/skel"
	cniversion "github.com/containernetworking/cni/pkg/version"

	"github.com/weirmesh/weir/internal/version"
	"github.com/weirmesh/weir/services/agent/internal/plugin"
)

func main() {
	// Versions before 0.4.0 know no CHECK and no address lists as we answer them.
	skel.PluginMainFuncs(plugin.Funcs(), cniversion.PluginSupports("0.4.0", "1.0.0", "1.1.0"), "weir-cni "+version.Version)
}
