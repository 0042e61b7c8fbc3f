// SPDX-License-Identifier: Apache-2.0

// Package envoyconfig reads CiliumEnvoyConfig and CiliumClusterwideEnvoyConfig objects: Envoy resources that a tenant writes and a proxy shared by the
// whole node runs. What it accepts is a list of types and fields; everything else is refused by name, with the path of the field.
package envoyconfig

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	"google.golang.org/protobuf/proto"
)

// Kinds of objects.
const (
	KindNamespaced  = "CiliumEnvoyConfig"
	KindClusterwide = "CiliumClusterwideEnvoyConfig"
)

// Error says which field of an object is wrong, and why.
type Error struct {
	// Field is its path, such as spec.resources[0].filter_chains[0].filters[1]; names as in Envoy's API.
	Field   string
	Message string
}

func (e *Error) Error() string { return e.Field + ": " + e.Message }

func fail(field, format string, args ...any) error {
	return &Error{Field: field, Message: fmt.Sprintf(format, args...)}
}

// Meta names an object.
type Meta struct {
	Kind, Namespace, Name, UID string
	Generation                 int64
}

// Key returns kind/namespace/name.
func (m Meta) Key() string { return m.Kind + "/" + m.Namespace + "/" + m.Name }

// Config is a valid object. It is never changed.
type Config struct {
	Meta
	// Services whose traffic goes to a listener of the object.
	Services []ServiceListener
	// BackendServices are further services that routes may name as clusters.
	BackendServices []BackendService
	// Listeners are the names of the object's listeners, in its order.
	Listeners []string
	// Spec is the object's spec as JSON.
	Spec []byte
	// Resources are decoded, checked and in today's form; names are as the user wrote them.
	Resources Resources
}

// ServiceListener leads a service's ports to a listener.
type ServiceListener struct {
	Namespace, Name string
	// Listener is never empty: the object's first one, if the user named none.
	Listener string
	// Ports of the service; empty = all.
	Ports []uint32
}

// BackendService is a service that routes may name as `namespace/name` or `namespace/name:port`.
type BackendService struct {
	Namespace, Name string
	// Ports by number or name; empty = all.
	Ports []string
}

// Resources of an object, by type.
type Resources struct {
	Listeners []*listenerv3.Listener
	Routes    []*routev3.RouteConfiguration
	Clusters  []*clusterv3.Cluster
}

// All returns all of them: listeners, route configurations, clusters.
func (r *Resources) All() []proto.Message {
	var all []proto.Message
	for _, m := range r.Listeners {
		all = append(all, m)
	}
	for _, m := range r.Routes {
		all = append(all, m)
	}
	for _, m := range r.Clusters {
		all = append(all, m)
	}
	return all
}

// ListenerFor returns the listener that a service's port leads to.
func (c *Config) ListenerFor(namespace, name string, port uint32) (string, bool) {
	for _, s := range c.Services {
		if s.Namespace == namespace && s.Name == name && (len(s.Ports) == 0 || slices.Contains(s.Ports, port)) {
			return s.Listener, true
		}
	}
	return "", false
}

// ServiceNames returns namespace/name of all services that the object names, sorted, each once.
func (c *Config) ServiceNames() []string {
	var names []string
	for _, s := range c.Services {
		names = append(names, s.Namespace+"/"+s.Name)
	}
	for _, s := range c.BackendServices {
		names = append(names, s.Namespace+"/"+s.Name)
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// ParseCluster splits the name of a service's cluster, `namespace/name` or `namespace/name:port` (port = number or name of a port; "" = all).
func ParseCluster(cluster string) (namespace, name, port string, ok bool) {
	namespace, rest, ok := strings.Cut(cluster, "/")
	if !ok {
		return "", "", "", false
	}
	name, port, withPort := strings.Cut(rest, ":")
	if !isName(namespace) || !isName(name) || withPort && !isName(port) {
		return "", "", "", false
	}
	return namespace, name, port, true
}

// Serves reports whether a cluster name stands for one of the object's own services.
func (c *Config) Serves(cluster string) bool {
	namespace, name, port, ok := ParseCluster(cluster)
	if !ok {
		return false
	}
	for _, s := range c.BackendServices {
		if s.Namespace == namespace && s.Name == name && (port == "" || len(s.Ports) == 0 || slices.Contains(s.Ports, port)) {
			return true
		}
	}
	for _, s := range c.Services {
		if s.Namespace == namespace && s.Name == name && portListed(s.Ports, port) {
			return true
		}
	}
	return false
}

func portListed(ports []uint32, port string) bool {
	if port == "" || len(ports) == 0 {
		return true
	}
	n, err := strconv.ParseUint(port, 10, 16)
	return err != nil || slices.Contains(ports, uint32(n))
}

// Limits on size and number: one object is a small part of what a node's proxy carries.
const (
	MaxSpec        = 1 << 20
	MaxResources   = 64
	MaxServices    = 256
	MaxDepth       = 64
	MaxRoutes      = 10_000
	MaxHosts       = 1_000
	MaxDomains     = 5_000
	MaxClusters    = 256
	MaxChains      = 64
	MaxFilters     = 16
	MaxRegex       = 1_024
	MaxRegexes     = 2_000
	MaxBody        = 4_096
	MaxHeaderEdits = 64
	MaxMatchers    = 64
)

type object struct {
	Kind     string `json:"kind"`
	Metadata struct {
		Namespace  string `json:"namespace"`
		Name       string `json:"name"`
		UID        string `json:"uid"`
		Generation int64  `json:"generation"`
	} `json:"metadata"`
	Spec json.RawMessage `json:"spec"`
}

// Parse reads the JSON of an object. What is wrong with it is an *Error.
func Parse(raw []byte) (*Config, error) {
	var o object
	if err := json.Unmarshal(raw, &o); err != nil {
		return nil, decodeError("", err)
	}
	return ParseSpec(Meta{
		Kind: o.Kind, Namespace: o.Metadata.Namespace, Name: o.Metadata.Name, UID: o.Metadata.UID, Generation: o.Metadata.Generation,
	}, o.Spec)
}

// ParseSpec is Parse for an object whose metadata are known.
func ParseSpec(meta Meta, raw []byte) (*Config, error) {
	if err := meta.check(); err != nil {
		return nil, err
	}
	if len(raw) > MaxSpec {
		return nil, fail("spec", "has %d bytes, more than %d", len(raw), MaxSpec)
	}
	if len(raw) == 0 {
		return nil, fail("spec", "is missing")
	}
	c := &Config{Meta: meta, Spec: slices.Clone(raw)}
	resources, err := c.readSpec(raw)
	if err != nil {
		return nil, err
	}
	if err := c.readResources(resources); err != nil {
		return nil, err
	}
	if err := c.linkServices(); err != nil {
		return nil, err
	}
	return c, nil
}

func (m Meta) check() error {
	switch m.Kind {
	case KindNamespaced:
		if !isName(m.Namespace) {
			return fail("metadata.namespace", "%q is not a name", m.Namespace)
		}
	case KindClusterwide:
		if m.Namespace != "" {
			return fail("metadata.namespace", "%q: the kind has none", m.Namespace)
		}
	default:
		return fail("kind", "%q is neither %s nor %s", m.Kind, KindNamespaced, KindClusterwide)
	}
	if !isName(m.Name) {
		return fail("metadata.name", "%q is not a name", m.Name)
	}
	return nil
}

// isName accepts what Kubernetes takes for a name, and no more: names become parts of resource names.
func isName(s string) bool {
	if s == "" || len(s) > 253 {
		return false
	}
	for _, c := range []byte(s) {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '.' {
			return false
		}
	}
	return true
}

type serviceSpec struct {
	Name      string   `json:"name"`
	Namespace string   `json:"namespace"`
	Listener  string   `json:"listener"`
	Ports     []uint32 `json:"ports"`
}

type backendSpec struct {
	Name      string   `json:"name"`
	Namespace string   `json:"namespace"`
	Number    []string `json:"number"`
}

// readSpec reads all but the resources, which it returns as they are.
func (c *Config) readSpec(raw []byte) ([]json.RawMessage, error) {
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(raw, &fields); err != nil {
		return nil, decodeError("spec", err)
	}
	var services []serviceSpec
	var backends []backendSpec
	var resources []json.RawMessage
	into := map[string]any{"services": &services, "backendServices": &backends, "resources": &resources}
	for _, key := range sortedKeys(fields) {
		target, ok := into[key]
		if !ok {
			return nil, fail("spec."+key, "is not supported")
		}
		if err := strictDecode(fields[key], target); err != nil {
			return nil, decodeError("spec."+key, err)
		}
	}
	if len(resources) == 0 {
		return nil, fail("spec.resources", "is empty")
	}
	if len(resources) > MaxResources {
		return nil, fail("spec.resources", "has %d items, more than %d", len(resources), MaxResources)
	}
	if len(services)+len(backends) > MaxServices {
		return nil, fail("spec.backendServices", "more than %d services in all", MaxServices)
	}
	if err := c.readServices(services); err != nil {
		return nil, err
	}
	return resources, c.readBackends(backends)
}

func (c *Config) readServices(services []serviceSpec) error {
	for i, s := range services {
		path := fmt.Sprintf("spec.services[%d]", i)
		namespace, err := c.serviceName(path, s.Namespace, s.Name)
		if err != nil {
			return err
		}
		for j, port := range s.Ports {
			if port == 0 || port > 65535 {
				return fail(fmt.Sprintf("%s.ports[%d]", path, j), "%d is not a port", port)
			}
		}
		c.Services = append(c.Services, ServiceListener{Namespace: namespace, Name: s.Name, Listener: s.Listener, Ports: s.Ports})
	}
	return nil
}

func (c *Config) readBackends(backends []backendSpec) error {
	for i, s := range backends {
		path := fmt.Sprintf("spec.backendServices[%d]", i)
		namespace, err := c.serviceName(path, s.Namespace, s.Name)
		if err != nil {
			return err
		}
		for j, port := range s.Number {
			if !isName(port) {
				return fail(fmt.Sprintf("%s.number[%d]", path, j), "%q is not a port", port)
			}
		}
		c.BackendServices = append(c.BackendServices, BackendService{Namespace: namespace, Name: s.Name, Ports: s.Number})
	}
	return nil
}

// serviceName checks a reference to a service and returns its namespace.
func (c *Config) serviceName(path, namespace, name string) (string, error) {
	if !isName(name) {
		return "", fail(path+".name", "%q is not a name", name)
	}
	if c.Kind == KindNamespaced {
		if namespace != "" && namespace != c.Namespace {
			return "", fail(path+".namespace", "%q: a %s may name services of its own namespace only (%s)", namespace, KindNamespaced, c.Namespace)
		}
		return c.Namespace, nil
	}
	if namespace == "" {
		return "default", nil
	}
	if !isName(namespace) {
		return "", fail(path+".namespace", "%q is not a name", namespace)
	}
	return namespace, nil
}

// linkServices gives each service its listener.
func (c *Config) linkServices() error {
	for i := range c.Services {
		s := &c.Services[i]
		path := fmt.Sprintf("spec.services[%d].listener", i)
		switch {
		case len(c.Listeners) == 0:
			return fail(path, "the object has no listener")
		case s.Listener == "":
			s.Listener = c.Listeners[0]
		case !slices.Contains(c.Listeners, s.Listener):
			return fail(path, "%q is no listener of the object", s.Listener)
		}
	}
	return nil
}

func strictDecode(raw []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(raw))
	d.DisallowUnknownFields()
	return d.Decode(into)
}

// decodeError gives an error of encoding/json the path of its field.
func decodeError(path string, err error) error {
	var known *Error
	if errors.As(err, &known) {
		return err
	}
	var typed *json.UnmarshalTypeError
	if errors.As(err, &typed) {
		if typed.Field != "" {
			path = strings.TrimPrefix(path+"."+typed.Field, ".")
		}
		return fail(path, "is a %s, not a %s", typed.Value, typed.Type)
	}
	return fail(path, "%s", strings.TrimPrefix(err.Error(), "json: "))
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
