// SPDX-License-Identifier: Apache-2.0

// Package plugin is the CNI plugin weir-cni: it checks what the container runtime says, asks the node's agent, and answers in CNI's JSON.
// It keeps nothing and touches no device itself.
package plugin

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
)

// Config is the network configuration on the plugin's standard input.
type Config struct {
	types.PluginConf
	// Socket is the path of the agent's unix socket.
	Socket string `json:"socket"`

	result types.Result
}

// Pod is what CNI_ARGS says of the pod.
type Pod struct{ Namespace, Name, UID string }

// maxConfig bounds the standard input: a network configuration is some hundred bytes, a GC list some hundred kilobytes.
const maxConfig = 4 << 20

// ParseConfig reads a network configuration. Errors are CNI errors that name the field.
func ParseConfig(stdin []byte) (*Config, error) {
	if len(stdin) > maxConfig {
		return nil, types.NewError(types.ErrInvalidNetworkConfig, "network configuration is too long", fmt.Sprintf("%d bytes, at most %d", len(stdin), maxConfig))
	}
	var c Config
	if err := json.Unmarshal(stdin, &c); err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, "network configuration is not valid JSON", err.Error())
	}
	switch {
	case c.Name == "":
		return nil, invalid("name", "is missing")
	case c.Socket == "":
		return nil, invalid("socket", "is missing: the path of the agent's unix socket")
	case !filepath.IsAbs(c.Socket):
		return nil, invalid("socket", fmt.Sprintf("%q is not an absolute path", c.Socket))
	case len(c.Socket) > 107:
		return nil, invalid("socket", fmt.Sprintf("is %d bytes long, a unix socket's path has at most 107", len(c.Socket)))
	}
	for i, a := range c.ValidAttachments {
		if a.ContainerID == "" || a.IfName == "" {
			return nil, invalid(fmt.Sprintf("cni.dev/valid-attachments[%d]", i), "needs containerID and ifname")
		}
	}
	if c.RawPrevResult != nil {
		raw, err := json.Marshal(c.RawPrevResult)
		if err != nil {
			return nil, invalid("prevResult", err.Error())
		}
		c.result, err = current.NewResult(raw)
		if err != nil {
			return nil, invalid("prevResult", err.Error())
		}
	}
	return &c, nil
}

func invalid(field, problem string) *types.Error {
	return types.NewError(types.ErrInvalidNetworkConfig, fmt.Sprintf("field %s %s", field, problem), "")
}

// ParseArgs reads CNI_ARGS, `KEY=VALUE;KEY=VALUE`. Unknown keys are ignored, as the kubelet sends more than we need.
func ParseArgs(args string) (Pod, error) {
	var p Pod
	for _, pair := range strings.Split(args, ";") {
		if pair == "" {
			continue
		}
		key, value, ok := strings.Cut(pair, "=")
		if !ok {
			return Pod{}, types.NewError(types.ErrInvalidEnvironmentVariables, fmt.Sprintf("CNI_ARGS: %q is not KEY=VALUE", pair), "")
		}
		switch key {
		case "K8S_POD_NAMESPACE":
			p.Namespace = value
		case "K8S_POD_NAME":
			p.Name = value
		case "K8S_POD_UID":
			p.UID = value
		}
	}
	for _, field := range []struct{ name, value string }{{"K8S_POD_NAMESPACE", p.Namespace}, {"K8S_POD_NAME", p.Name}} {
		if field.value == "" {
			return Pod{}, types.NewError(types.ErrInvalidEnvironmentVariables, "CNI_ARGS: "+field.name+" is missing", "")
		}
	}
	return p, nil
}
