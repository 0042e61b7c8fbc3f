// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"fmt"
	"net/netip"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/validation"
)

// podSpec checks a pod's spec. Fields that would change what the pod does, and that the lab does not have, are refused; those that
// only tune or protect it are noted.
func (v *validator) podSpec(path string, spec *corev1.PodSpec) {
	if len(spec.Containers) == 0 {
		v.at(path+".containers", "required: at least one container")
	}
	v.containers(path+".containers", spec.Containers)
	for field, given := range map[string]bool{
		"initContainers":      len(spec.InitContainers) > 0,
		"ephemeralContainers": len(spec.EphemeralContainers) > 0,
		"volumes":             len(spec.Volumes) > 0,
		"hostPID":             spec.HostPID,
		"hostIPC":             spec.HostIPC,
		"dnsConfig":           spec.DNSConfig != nil,
		"setHostnameAsFQDN":   spec.SetHostnameAsFQDN != nil && *spec.SetHostnameAsFQDN,
	} {
		if given {
			v.at(path+"."+field, "not supported by the lab: containers are programs of this machine, on its file system")
		}
	}
	switch spec.RestartPolicy {
	case "":
		spec.RestartPolicy = corev1.RestartPolicyAlways
	case corev1.RestartPolicyAlways, corev1.RestartPolicyOnFailure, corev1.RestartPolicyNever:
	default:
		v.at(path+".restartPolicy", "expected Always, OnFailure or Never, got %q", spec.RestartPolicy)
	}
	if spec.TerminationGracePeriodSeconds != nil && *spec.TerminationGracePeriodSeconds < 0 {
		v.at(path+".terminationGracePeriodSeconds", "expected 0 or more, got %d", *spec.TerminationGracePeriodSeconds)
	}
	v.labels(path+".nodeSelector", spec.NodeSelector)
	if spec.Hostname != "" {
		v.problems(path+".hostname", validation.IsDNS1123Label(spec.Hostname))
	}
	if spec.Subdomain != "" {
		v.problems(path+".subdomain", validation.IsDNS1123Label(spec.Subdomain))
	}
	for i, alias := range spec.HostAliases {
		if _, err := netip.ParseAddr(alias.IP); err != nil {
			v.at(fmt.Sprintf("%s.hostAliases[%d].ip", path, i), "expected an address, got %q", alias.IP)
		}
		for j, name := range alias.Hostnames {
			v.problems(fmt.Sprintf("%s.hostAliases[%d].hostnames[%d]", path, i, j), validation.IsDNS1123Subdomain(name))
		}
	}
	if spec.Affinity != nil {
		v.note(path + ".affinity")
	}
	if len(spec.TopologySpreadConstraints) > 0 {
		v.note(path + ".topologySpreadConstraints")
	}
	if spec.SecurityContext != nil {
		v.note(path + ".securityContext")
	}
	if spec.ServiceAccountName != "" {
		v.note(path + ".serviceAccountName (beyond being an identity's label)")
	}
}

func (v *validator) containers(path string, containers []corev1.Container) {
	names := map[string]int{}
	ports := map[string]string{}
	for i := range containers {
		container := &containers[i]
		at := fmt.Sprintf("%s[%d]", path, i)
		if container.Name == "" {
			v.at(at+".name", "required")
		} else {
			v.problems(at+".name", validation.IsDNS1123Label(container.Name))
		}
		if first, twice := names[container.Name]; twice {
			v.at(at+".name", "%q is also the name of %s[%d]", container.Name, path, first)
		}
		names[container.Name] = i
		v.container(at, container)
		for j := range container.Ports {
			port := &container.Ports[j]
			portPath := fmt.Sprintf("%s.ports[%d]", at, j)
			v.portNumber(portPath+".containerPort", port.ContainerPort, true)
			if port.Protocol == "" {
				port.Protocol = corev1.ProtocolTCP
			}
			v.protocol(portPath+".protocol", port.Protocol)
			if port.HostPort != 0 {
				v.at(portPath+".hostPort", "not supported by the lab yet")
			}
			if port.Name == "" {
				continue
			}
			v.problems(portPath+".name", validation.IsValidPortName(port.Name))
			if first, twice := ports[port.Name]; twice {
				v.at(portPath+".name", "%q is also the name of %s", port.Name, first)
			}
			ports[port.Name] = portPath
		}
	}
}

func (v *validator) container(path string, container *corev1.Container) {
	if len(container.Command)+len(container.Args) == 0 {
		v.at(path+".command", "required: the lab runs a program of this machine; it does not read the image")
	}
	if container.WorkingDir != "" && !strings.HasPrefix(container.WorkingDir, "/") {
		v.at(path+".workingDir", "expected an absolute path, got %q", container.WorkingDir)
	}
	for field, given := range map[string]bool{
		"volumeMounts":  len(container.VolumeMounts) > 0,
		"volumeDevices": len(container.VolumeDevices) > 0,
		"lifecycle":     container.Lifecycle != nil,
		"stdin":         container.Stdin,
		"tty":           container.TTY,
	} {
		if given {
			v.at(path+"."+field, "not supported by the lab")
		}
	}
	for field, given := range map[string]bool{
		"livenessProbe":   container.LivenessProbe != nil,
		"startupProbe":    container.StartupProbe != nil,
		"resources":       len(container.Resources.Limits)+len(container.Resources.Requests) > 0,
		"securityContext": container.SecurityContext != nil,
	} {
		if given {
			v.note(path + "." + field)
		}
	}
	v.env(path, container)
	if container.ReadinessProbe != nil {
		v.probe(path+".readinessProbe", container)
	}
}

func (v *validator) env(path string, container *corev1.Container) {
	for i, variable := range container.Env {
		at := fmt.Sprintf("%s.env[%d]", path, i)
		if variable.Name == "" || strings.ContainsAny(variable.Name, "=\x00") {
			v.at(at+".name", "expected the name of a variable, got %q", variable.Name)
		}
		if strings.ContainsRune(variable.Value, 0) {
			v.at(at+".value", "expected text without zero bytes")
		}
		from := variable.ValueFrom
		if from == nil {
			continue
		}
		if variable.Value != "" {
			v.at(at, "expected value or valueFrom, not both")
		}
		switch {
		case from.FieldRef != nil:
			if !KnownFieldPath(from.FieldRef.FieldPath) {
				v.at(at+".valueFrom.fieldRef.fieldPath", "expected metadata.name, metadata.namespace, metadata.uid, metadata.labels['KEY'], "+
					"metadata.annotations['KEY'], spec.nodeName, spec.serviceAccountName, status.podIP, status.podIPs, status.hostIP or status.hostIPs, got %q", from.FieldRef.FieldPath)
			}
		case from.ConfigMapKeyRef != nil:
			if from.ConfigMapKeyRef.Name == "" || from.ConfigMapKeyRef.Key == "" {
				v.at(at+".valueFrom.configMapKeyRef", "name and key are required")
			}
		default:
			v.at(at+".valueFrom", "expected fieldRef or configMapKeyRef: the lab has no other source")
		}
	}
	for i, source := range container.EnvFrom {
		if source.ConfigMapRef == nil || source.ConfigMapRef.Name == "" {
			v.at(fmt.Sprintf("%s.envFrom[%d]", path, i), "expected configMapRef with a name: the lab has no other source")
		}
	}
}

// KnownFieldPath reports whether the downward API of the lab has this field.
func KnownFieldPath(path string) bool {
	switch path {
	case "metadata.name", "metadata.namespace", "metadata.uid", "spec.nodeName", "spec.serviceAccountName",
		"status.podIP", "status.podIPs", "status.hostIP", "status.hostIPs":
		return true
	}
	_, _, ok := MapFieldPath(path)
	return ok
}

// MapFieldPath splits metadata.labels['KEY'] into "labels" and KEY.
func MapFieldPath(path string) (field, key string, ok bool) {
	for _, field := range []string{"labels", "annotations"} {
		rest, found := strings.CutPrefix(path, "metadata."+field+"['")
		key, closed := strings.CutSuffix(rest, "']")
		if found && closed && key != "" {
			return field, key, true
		}
	}
	return "", "", false
}

func (v *validator) probe(path string, container *corev1.Container) {
	probe := container.ReadinessProbe
	handlers := 0
	port := func(path string, port intstr.IntOrString) {
		if _, ok := PortNumber(port, container.Ports); !ok {
			v.at(path, "expected 1 to 65535 or the name of a port of this container, got %q", port.String())
		}
	}
	if probe.HTTPGet != nil {
		handlers++
		port(path+".httpGet.port", probe.HTTPGet.Port)
		if probe.HTTPGet.Scheme != "" && probe.HTTPGet.Scheme != corev1.URISchemeHTTP {
			v.at(path+".httpGet.scheme", "expected HTTP, got %q", probe.HTTPGet.Scheme)
		}
		if probe.HTTPGet.Path != "" && !strings.HasPrefix(probe.HTTPGet.Path, "/") {
			v.at(path+".httpGet.path", "expected a path that begins with /, got %q", probe.HTTPGet.Path)
		}
	}
	if probe.TCPSocket != nil {
		handlers++
		port(path+".tcpSocket.port", probe.TCPSocket.Port)
	}
	if probe.Exec != nil {
		handlers++
		if len(probe.Exec.Command) == 0 {
			v.at(path+".exec.command", "required")
		}
	}
	if handlers != 1 {
		v.at(path, "expected exactly one of httpGet, tcpSocket and exec")
	}
	for field, value := range map[string]int32{
		"initialDelaySeconds": probe.InitialDelaySeconds, "periodSeconds": probe.PeriodSeconds, "timeoutSeconds": probe.TimeoutSeconds,
		"successThreshold": probe.SuccessThreshold, "failureThreshold": probe.FailureThreshold,
	} {
		if value < 0 {
			v.at(path+"."+field, "expected 0 or more, got %d", value)
		}
	}
}

// PortNumber returns the number of a port given by number or by name.
func PortNumber(port intstr.IntOrString, ports []corev1.ContainerPort) (int32, bool) {
	if port.Type == intstr.Int {
		return port.IntVal, port.IntVal >= 1 && port.IntVal <= 65535
	}
	for _, p := range ports {
		if p.Name == port.StrVal && p.Name != "" {
			return p.ContainerPort, true
		}
	}
	return 0, false
}
