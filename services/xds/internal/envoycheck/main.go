// SPDX-License-Identifier: Apache-2.0

// Command envoycheck writes a bootstrap for each golden snapshot, with everything static: routes in their listeners, endpoints in their clusters.
// `envoy --mode validate` then reads all that a proxy would be sent. Used by scripts/envoy-check.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: envoycheck <folder of golden snapshots> <output folder>")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "envoycheck:", err)
		os.Exit(1)
	}
}

func run(from, to string) error {
	files, err := filepath.Glob(filepath.Join(from, "*.json"))
	if err != nil {
		return err
	}
	if len(files) == 0 {
		return errors.New("no golden snapshots in " + from)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		var resources map[string]map[string]any
		if err := json.Unmarshal(text, &resources); err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
		out, err := json.MarshalIndent(bootstrap(resources), "", " ")
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(to, filepath.Base(file)), out, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// bootstrap makes one of a snapshot: keys are "<type> <name>".
func bootstrap(resources map[string]map[string]any) map[string]any {
	var listeners, clusters []any
	for key, r := range resources {
		kind, _, _ := strings.Cut(key, " ")
		switch kind {
		case "listener":
			delete(r, "@type")
			inline(r, resources)
			listeners = append(listeners, r)
		case "cluster":
			delete(r, "@type")
			clusters = append(clusters, static(r, resources))
		}
	}
	clusters = append(clusters, map[string]any{
		"name": "weir-access-log", "type": "STATIC",
		"load_assignment": map[string]any{"cluster_name": "weir-access-log", "endpoints": []any{map[string]any{"lb_endpoints": []any{
			map[string]any{"endpoint": map[string]any{"address": map[string]any{"pipe": map[string]any{"path": "/run/weir/accesslog.sock"}}}},
		}}}},
	})
	return map[string]any{
		"node":             map[string]any{"id": "check", "cluster": "weir"},
		"static_resources": map[string]any{"listeners": listeners, "clusters": clusters},
		// Regular expressions of policies may be longer programs than Envoy allows by itself.
		"layered_runtime": map[string]any{"layers": []any{map[string]any{
			"name": "weir", "static_layer": map[string]any{"re2.max_program_size.error_level": 100000, "re2.max_program_size.warn_level": 100000},
		}}},
	}
}

// inline puts route configurations in the place of their names.
func inline(v any, resources map[string]map[string]any) {
	switch v := v.(type) {
	case map[string]any:
		if rds, ok := v["rds"].(map[string]any); ok {
			name, _ := rds["route_config_name"].(string)
			routes := map[string]any{}
			for key, value := range resources["routes "+name] {
				if key != "@type" {
					routes[key] = value
				}
			}
			delete(v, "rds")
			v["route_config"] = routes
		}
		for _, inner := range v {
			inline(inner, resources)
		}
	case []any:
		for _, inner := range v {
			inline(inner, resources)
		}
	}
}

// static gives a cluster its endpoints.
func static(cluster map[string]any, resources map[string]map[string]any) map[string]any {
	eds, ok := cluster["eds_cluster_config"].(map[string]any)
	if !ok {
		return cluster
	}
	name, _ := eds["service_name"].(string)
	assignment := resources["endpoints "+name]
	delete(assignment, "@type")
	delete(cluster, "eds_cluster_config")
	cluster["type"], cluster["load_assignment"] = "STATIC", assignment
	return cluster
}
