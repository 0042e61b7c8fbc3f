// SPDX-License-Identifier: Apache-2.0

package command

import (
	"context"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/timestamppb"

	labv1 "github.com/weirmesh/weir/gen/weir/lab/v1"
)

func statusCommand() *cobra.Command {
	var name, output string
	command := &cobra.Command{
		Use:   "status",
		Short: "Show what runs in a lab",
		Args:  cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			if output != "" && output != "json" {
				return fmt.Errorf("output: expected json, got %q", output)
			}
			return call(command.Context(), name, func(ctx context.Context, client labv1.LabServiceClient) error {
				response, err := client.GetLab(ctx, &labv1.GetLabRequest{})
				if err != nil {
					return err
				}
				if output == "json" {
					data, err := protojson.MarshalOptions{Multiline: true, UseProtoNames: true}.Marshal(response)
					if err != nil {
						return fmt.Errorf("encode: %w", err)
					}
					_, err = fmt.Fprintln(command.OutOrStdout(), string(data))
					return err
				}
				return printStatus(command.OutOrStdout(), response, time.Now())
			})
		},
	}
	nameFlag(command, &name)
	command.Flags().StringVarP(&output, "output", "o", "", "`format`: json (default: tables)")
	return command
}

// printStatus writes tables as kubectl does.
func printStatus(w io.Writer, response *labv1.GetLabResponse, now time.Time) error {
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	row := func(cells ...string) { fmt.Fprintln(t, strings.Join(cells, "\t")) }
	fmt.Fprintf(t, "Lab %s, pid %d, up %s, observer %s\n\n", response.GetName(), response.GetPid(), age(response.GetStarted(), now), response.GetObserver())
	row("NODE", "ADDRESSES", "POD CIDRS")
	for _, node := range response.GetNodes() {
		row(node.GetName(), strings.Join(node.GetAddresses(), ","), strings.Join(node.GetPodCidrs(), ","))
	}
	fmt.Fprintln(t)
	row("PART", "STATE", "PID", "RESTARTS", "AGE", "LOG")
	for _, part := range response.GetParts() {
		row(part.GetName(), part.GetState(), fmt.Sprint(part.GetPid()), fmt.Sprint(part.GetRestarts()), age(part.GetStarted(), now), part.GetLog())
	}
	if len(response.GetPods()) > 0 {
		fmt.Fprintln(t)
		row("NAMESPACE", "NAME", "READY", "STATUS", "RESTARTS", "AGE", "IP", "NODE")
	}
	for _, pod := range response.GetPods() {
		row(pod.GetNamespace(), pod.GetName(), fmt.Sprintf("%d/%d", pod.GetReady(), pod.GetContainers()), pod.GetStatus(), fmt.Sprint(pod.GetRestarts()),
			age(pod.GetCreated(), now), orNone(strings.Join(pod.GetAddresses(), ",")), orNone(pod.GetNode()))
	}
	if len(response.GetServices()) > 0 {
		fmt.Fprintln(t)
		row("NAMESPACE", "SERVICE", "CLUSTER-IP", "EXTERNAL-IP", "PORTS", "ENDPOINTS")
	}
	for _, service := range response.GetServices() {
		row(service.GetNamespace(), service.GetName(), strings.Join(service.GetClusterIps(), ","), orNone(strings.Join(service.GetExternalIps(), ",")), orNone(strings.Join(service.GetPorts(), ",")),
			orNone(strings.Join(service.GetEndpoints(), ",")))
	}
	printPolicies(t, row, response.GetPolicies(), now)
	if len(response.GetHosts()) > 0 {
		fmt.Fprintln(t)
		row("HOST", "READY", "STATUS", "RESTARTS", "AGE", "ADDRESSES")
	}
	for _, host := range response.GetHosts() {
		row(host.GetName(), fmt.Sprintf("%d/%d", host.GetReady(), host.GetContainers()), host.GetStatus(), fmt.Sprint(host.GetRestarts()),
			age(host.GetCreated(), now), strings.Join(host.GetAddresses(), ","))
	}
	if err := t.Flush(); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	for _, pod := range response.GetPods() {
		if pod.GetReady() < pod.GetContainers() && pod.GetMessage() != "" {
			fmt.Fprintf(w, "\npod %s/%s: %s\n", pod.GetNamespace(), pod.GetName(), pod.GetMessage())
		}
	}
	for _, host := range response.GetHosts() {
		if host.GetMessage() != "" {
			fmt.Fprintf(w, "\nhost %s: %s\n", host.GetName(), host.GetMessage())
		}
	}
	for _, policy := range response.GetPolicies() {
		if policy.GetMessage() != "" && policy.GetValid() != "True" {
			fmt.Fprintf(w, "\n%s %s: %s\n", policy.GetKind(), policyName(policy), policy.GetMessage())
		}
	}
	for _, fault := range response.GetManifestErrors() {
		fmt.Fprintf(w, "\nmanifest error, the last good state stays: %s\n", fault)
	}
	return nil
}

// printPolicies writes the table of policies.
func printPolicies(w io.Writer, row func(...string), policies []*labv1.Policy, now time.Time) {
	if len(policies) == 0 {
		return
	}
	fmt.Fprintln(w)
	row("NAMESPACE", "POLICY", "KIND", "GENERATION", "VALID", "IN FORCE", "AGE")
	for _, policy := range policies {
		inForce := "-"
		switch generation := policy.GetEnforcedGeneration(); {
		case generation == policy.GetGeneration():
			inForce = fmt.Sprintf("%d/%d nodes", policy.GetEnforcingNodes(), policy.GetNodes())
		case generation > 0:
			inForce = fmt.Sprintf("generation %d on %d/%d nodes", generation, policy.GetEnforcingNodes(), policy.GetNodes())
		}
		row(orNone(policy.GetNamespace()), policy.GetName(), policy.GetKind(), fmt.Sprint(policy.GetGeneration()), orUnknown(policy.GetValid()), inForce,
			age(policy.GetCreated(), now))
	}
}

// policyName is a policy's name, with its namespace in front if it has one.
func policyName(policy *labv1.Policy) string {
	if policy.GetNamespace() == "" {
		return policy.GetName()
	}
	return policy.GetNamespace() + "/" + policy.GetName()
}

func orUnknown(text string) string {
	if text == "" {
		return "unknown"
	}
	return text
}

func orNone(text string) string {
	if text == "" {
		return "<none>"
	}
	return text
}

// age is a time span as kubectl writes it.
func age(since *timestamppb.Timestamp, now time.Time) string {
	if since == nil {
		return "-"
	}
	d := max(now.Sub(since.AsTime()), 0)
	switch {
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours())/24)
}
