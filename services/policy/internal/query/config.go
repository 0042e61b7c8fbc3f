// SPDX-License-Identifier: Apache-2.0

package query

import (
	"errors"
	"fmt"
	"slices"

	"sigs.k8s.io/yaml"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	"github.com/weirmesh/weir/internal/envoyconfig"
	"github.com/weirmesh/weir/services/policy/internal/object"
	"github.com/weirmesh/weir/services/policy/internal/state"
)

// kindIn reads the kind of a document; "" = it says none.
func kindIn(document []byte) string {
	var o struct {
		Kind string `json:"kind"`
	}
	if yaml.Unmarshal(document, &o) != nil {
		return ""
	}
	return o.Kind
}

// validateConfig checks an Envoy configuration, and says what it would route.
func (c *cluster) validateConfig(v *policyv1.Validated, kind string, document []byte) {
	v.Kind = kind
	raw, err := yaml.YAMLToJSON(document)
	if err != nil {
		v.Error = err.Error()
		return
	}
	if raw, v.Namespace, v.Name, err = named(kind, raw); err != nil {
		v.Error = err.Error()
		return
	}
	config, err := envoyconfig.Parse(raw)
	var fault *envoyconfig.Error
	switch {
	case errors.As(err, &fault):
		v.Error, v.Field = fault.Error(), fault.Field
		return
	case err != nil:
		v.Error = err.Error()
		return
	}
	for i := range config.Services {
		v.Changes = append(v.Changes, c.routesOf(config, i)...)
	}
	if len(v.Changes) == 0 {
		v.Changes = []string{"nothing is routed by it"}
	}
}

// named returns an object with its namespace, which is "default" where a namespaced one says none.
func named(kind string, raw []byte) (out []byte, namespace, name string, err error) {
	var o map[string]any
	if err := yaml.Unmarshal(raw, &o); err != nil {
		return nil, "", "", fmt.Errorf("read document: %w", err)
	}
	meta, ok := o["metadata"].(map[string]any)
	if !ok {
		return nil, "", "", errors.New("metadata is missing")
	}
	name, _ = meta["name"].(string)
	namespace, _ = meta["namespace"].(string)
	if kind == object.KindCiliumEnvoyConfig && namespace == "" {
		namespace = "default"
		meta["namespace"] = namespace
	}
	if raw, err = yaml.Marshal(o); err != nil {
		return nil, namespace, name, fmt.Errorf("write document: %w", err)
	}
	if raw, err = yaml.YAMLToJSON(raw); err != nil {
		return nil, namespace, name, fmt.Errorf("write document: %w", err)
	}
	return raw, namespace, name, nil
}

// routesOf says what becomes of the ports of one service of a configuration.
func (c *cluster) routesOf(config *envoyconfig.Config, at int) []string {
	l := &config.Services[at]
	name := l.Namespace + "/" + l.Name
	r, ok := c.snapshot.Get(state.Key{Kind: state.KindService, Name: name})
	service, _ := r.(state.Service)
	switch {
	case !ok:
		return []string{fmt.Sprintf("there is no service %s: nothing is routed", name)}
	case len(service.ClusterIPs) == 0:
		return []string{fmt.Sprintf("service %s has no cluster IP: nothing is routed", name)}
	}
	var lines []string
	for _, p := range service.Ports {
		if p.Protocol != object.TCP || len(l.Ports) > 0 && !slices.Contains(l.Ports, uint32(p.Port)) {
			continue
		}
		before, routed := c.routes[p.Route]
		switch {
		case !routed:
			lines = append(lines, fmt.Sprintf("%s:%d: pods' connections would go through listener %s", name, p.Port, l.Listener))
		case before.Kind == config.Kind && before.Namespace == config.Namespace && before.Name == config.Name && before.Listener == l.Listener:
			lines = append(lines, fmt.Sprintf("%s:%d: goes through listener %s, as now", name, p.Port, l.Listener))
		case before.Kind == config.Kind && before.Namespace == config.Namespace && before.Name == config.Name:
			lines = append(lines, fmt.Sprintf("%s:%d: routed through listener %s, would go through %s", name, p.Port, before.Listener, l.Listener))
		default:
			lines = append(lines, fmt.Sprintf("%s:%d: conflict, routed by %s already", name, p.Port,
				object.Key{Kind: before.Kind, Namespace: before.Namespace, Name: before.Name}))
		}
	}
	return lines
}
