// SPDX-License-Identifier: Apache-2.0

package pod

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/weirmesh/weir/lab/internal/manifest"
)

// configMaps finds a ConfigMap by namespace and name.
type configMaps func(namespace, name string) (*corev1.ConfigMap, bool)

// environment builds a container's variables: base first, then envFrom, then env, each in order, as Kubernetes does.
func environment(base []string, container *corev1.Container, pod *corev1.Pod, find configMaps) ([]string, error) {
	values := map[string]string{}
	var order []string
	set := func(name, value string) {
		if _, known := values[name]; !known {
			order = append(order, name)
		}
		values[name] = value
	}
	for _, variable := range base {
		name, value, _ := strings.Cut(variable, "=")
		set(name, value)
	}
	for _, source := range container.EnvFrom {
		reference := source.ConfigMapRef
		configMap, ok := find(pod.Namespace, reference.Name)
		if !ok {
			if reference.Optional != nil && *reference.Optional {
				continue
			}
			return nil, fmt.Errorf("configmap %q not found", reference.Name)
		}
		for _, key := range slices.Sorted(maps.Keys(configMap.Data)) {
			set(source.Prefix+key, configMap.Data[key])
		}
	}
	for _, variable := range container.Env {
		value := expand(variable.Value, values)
		if from := variable.ValueFrom; from != nil {
			var given bool
			var err error
			value, given, err = valueFrom(from, pod, find)
			if err != nil {
				return nil, fmt.Errorf("variable %s: %w", variable.Name, err)
			}
			if !given {
				continue
			}
		}
		set(variable.Name, value)
	}
	var env []string
	for _, name := range order {
		env = append(env, name+"="+values[name])
	}
	return env, nil
}

func valueFrom(from *corev1.EnvVarSource, pod *corev1.Pod, find configMaps) (value string, given bool, err error) {
	if from.FieldRef != nil {
		return field(pod, from.FieldRef.FieldPath), true, nil
	}
	reference := from.ConfigMapKeyRef
	optional := reference.Optional != nil && *reference.Optional
	configMap, ok := find(pod.Namespace, reference.Name)
	if !ok {
		if optional {
			return "", false, nil
		}
		return "", false, fmt.Errorf("configmap %q not found", reference.Name)
	}
	value, ok = configMap.Data[reference.Key]
	if !ok && !optional {
		return "", false, fmt.Errorf("configmap %q has no key %q", reference.Name, reference.Key)
	}
	return value, ok, nil
}

// field reads a field of the downward API; the manifest was checked to name a known one.
func field(pod *corev1.Pod, path string) string {
	switch path {
	case "metadata.name":
		return pod.Name
	case "metadata.namespace":
		return pod.Namespace
	case "metadata.uid":
		return string(pod.UID)
	case "spec.nodeName":
		return pod.Spec.NodeName
	case "spec.serviceAccountName":
		return pod.Spec.ServiceAccountName
	case "status.podIP":
		return pod.Status.PodIP
	case "status.hostIP":
		return pod.Status.HostIP
	case "status.podIPs":
		var all []string
		for _, ip := range pod.Status.PodIPs {
			all = append(all, ip.IP)
		}
		return strings.Join(all, ",")
	case "status.hostIPs":
		var all []string
		for _, ip := range pod.Status.HostIPs {
			all = append(all, ip.IP)
		}
		return strings.Join(all, ",")
	}
	switch kind, key, _ := manifest.MapFieldPath(path); kind {
	case "labels":
		return pod.Labels[key]
	case "annotations":
		return pod.Annotations[key]
	}
	return ""
}

// expand puts values in the place of $(NAME). $$ stands for one $; names that are not known stay as they are.
func expand(text string, values map[string]string) string {
	var b strings.Builder
	for i := 0; i < len(text); i++ {
		if text[i] != '$' || i+1 == len(text) {
			b.WriteByte(text[i])
			continue
		}
		switch text[i+1] {
		case '$':
			b.WriteByte('$')
			i++
		case '(':
			end := strings.IndexByte(text[i:], ')')
			if end < 0 {
				b.WriteByte('$')
				continue
			}
			whole := text[i : i+end+1]
			if value, ok := values[whole[2:len(whole)-1]]; ok {
				b.WriteString(value)
			} else {
				b.WriteString(whole)
			}
			i += end
		default:
			b.WriteByte('$')
		}
	}
	return b.String()
}

// arguments returns the container's program and arguments, expanded.
func arguments(container *corev1.Container, env []string) []string {
	values := map[string]string{}
	for _, variable := range env {
		name, value, _ := strings.Cut(variable, "=")
		values[name] = value
	}
	var args []string
	for _, arg := range append(slices.Clone(container.Command), container.Args...) {
		args = append(args, expand(arg, values))
	}
	return args
}
