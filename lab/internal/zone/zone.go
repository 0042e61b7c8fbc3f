// SPDX-License-Identifier: Apache-2.0

// Package zone writes the cluster's services and pods as a DNS zone file, by the names of the Kubernetes DNS specification 1.1.0.
package zone

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

// Domain is the cluster's domain.
const Domain = "cluster.local"

// ttl of every record, in seconds. Pods come and go; Kubernetes uses 5 as well.
const ttl = 5

// Objects is what a zone is made of.
type Objects struct {
	Services []*corev1.Service
	Slices   []*discoveryv1.EndpointSlice
	Pods     []*corev1.Pod
}

// Render returns the zone file. Equal objects give equal records; serial must rise when they change.
func Render(serial uint32, objects Objects) string {
	r := &records{seen: map[string]bool{}}
	for _, service := range objects.Services {
		r.service(service, slicesOf(service, objects.Slices))
	}
	for _, pod := range objects.Pods {
		if pod.Spec.HostNetwork {
			continue
		}
		for _, ip := range pod.Status.PodIPs {
			r.address(dashed(ip.IP)+"."+pod.Namespace+".pod", ip.IP)
		}
	}
	var b strings.Builder
	fmt.Fprintf(&b, "$ORIGIN %s.\n$TTL %d\n", Domain, ttl)
	// The last number is how long a name may be remembered as missing.
	fmt.Fprintf(&b, "@ IN SOA ns.dns.%s. hostmaster.%s. %d 7200 1800 86400 1\n", Domain, Domain, serial)
	fmt.Fprintf(&b, "@ IN NS ns.dns.%s.\n", Domain)
	b.WriteString("dns-version IN TXT \"1.1.0\"\n")
	if !r.dns {
		// A zone must say where its name server is.
		b.WriteString("ns.dns IN A 127.0.0.1\n")
	}
	slices.Sort(r.lines)
	for _, line := range r.lines {
		b.WriteString(line)
		b.WriteByte('\n')
	}
	return b.String()
}

type records struct {
	lines []string
	seen  map[string]bool
	dns   bool
}

func (r *records) add(line string) {
	if !r.seen[line] {
		r.seen[line] = true
		r.lines = append(r.lines, line)
	}
}

func (r *records) address(name, ip string) {
	address, err := netip.ParseAddr(ip)
	switch {
	case err != nil:
	case address.Is4():
		r.add(name + " IN A " + address.String())
	default:
		r.add(name + " IN AAAA " + address.String())
	}
}

func (r *records) srv(name string, port int32, target string) {
	r.add(fmt.Sprintf("%s IN SRV 0 100 %d %s.%s.", name, port, target, Domain))
}

func slicesOf(service *corev1.Service, all []*discoveryv1.EndpointSlice) []*discoveryv1.EndpointSlice {
	var own []*discoveryv1.EndpointSlice
	for _, slice := range all {
		if slice.Namespace == service.Namespace && slice.Labels[discoveryv1.LabelServiceName] == service.Name {
			own = append(own, slice)
		}
	}
	return own
}

func (r *records) service(service *corev1.Service, endpoints []*discoveryv1.EndpointSlice) {
	name := service.Name + "." + service.Namespace + ".svc"
	if service.Spec.ClusterIP == corev1.ClusterIPNone {
		r.headless(name, endpoints)
		return
	}
	for _, ip := range service.Spec.ClusterIPs {
		r.address(name, ip)
		if service.Name == "kube-dns" && service.Namespace == "kube-system" {
			r.address("ns.dns", ip)
			r.dns = true
		}
	}
	for _, port := range service.Spec.Ports {
		if port.Name != "" {
			r.srv(portName(port.Name, port.Protocol)+"."+name, port.Port, name)
		}
	}
}

// headless services are the addresses of their ready pods, each also with a name of its own.
func (r *records) headless(name string, endpoints []*discoveryv1.EndpointSlice) {
	for _, slice := range endpoints {
		for _, endpoint := range slice.Endpoints {
			if endpoint.Conditions.Ready != nil && !*endpoint.Conditions.Ready {
				continue
			}
			for _, ip := range endpoint.Addresses {
				host := dashed(ip)
				if endpoint.Hostname != nil {
					host = *endpoint.Hostname
				}
				r.address(name, ip)
				r.address(host+"."+name, ip)
				for _, port := range slice.Ports {
					if port.Name != nil && *port.Name != "" {
						r.srv(portName(*port.Name, *port.Protocol)+"."+name, *port.Port, host+"."+name)
					}
				}
			}
		}
	}
}

func portName(port string, protocol corev1.Protocol) string {
	return "_" + port + "._" + strings.ToLower(string(protocol))
}

// dashed makes a label of an address: 10-244-1-5, fd00-10-244-1--5.
func dashed(ip string) string {
	label := strings.NewReplacer(".", "-", ":", "-").Replace(ip)
	// A label neither begins nor ends with a dash.
	if strings.HasPrefix(label, "-") {
		label = "0" + label
	}
	if strings.HasSuffix(label, "-") {
		label += "0"
	}
	return label
}
