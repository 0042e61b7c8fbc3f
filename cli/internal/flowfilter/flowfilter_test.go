// SPDX-License-Identifier: Apache-2.0

package flowfilter

import (
	"bytes"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/pflag"

	"google.golang.org/protobuf/proto"
)

// parse gives args to a flag set that holds the filter flags alone.
func parse(args []string) (*Builder, error) {
	b := &Builder{}
	fs := pflag.NewFlagSet("observe", pflag.ContinueOnError)
	fs.SetOutput(io.Discard)
	b.Register(fs)
	if err := fs.Parse(args); err != nil {
		return nil, err
	}
	return b, b.Finish()
}

func raw(t testing.TB, b *Builder) string {
	t.Helper()
	var out bytes.Buffer
	if err := WriteRaw(&out, b.Allow(), b.Deny()); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

func yaml(allow, deny []string) string {
	var s strings.Builder
	for _, l := range []struct {
		name  string
		items []string
	}{{"allowlist", allow}, {"denylist", deny}} {
		if len(l.items) > 0 {
			s.WriteString(l.name + ":\n")
		}
		for _, i := range l.items {
			s.WriteString("    - '" + i + "'\n")
		}
	}
	if s.Len() == 0 {
		return "{}\n"
	}
	return s.String()
}

func TestFlagsToFilters(t *testing.T) {
	tests := []struct {
		args        string // separated by spaces; "␣" stands for a space inside
		allow, deny []string
	}{
		{args: ""},
		{args: "--pod a", allow: []string{`{"source_pod":["a"]}`, `{"destination_pod":["a"]}`}},
		{args: "-n x -n y --to-port 80", allow: []string{`{"source_pod":["x/","y/"],"destination_port":["80"]}`, `{"destination_pod":["x/","y/"],"destination_port":["80"]}`}},
		{args: "--type trace:to-endpoint", allow: []string{`{"event_type":[{"type":4,"match_sub_type":true}]}`}},
		{args: "--not --pod a --not --verdict FORWARDED", deny: []string{`{"source_pod":["a"],"verdict":["FORWARDED"]}`, `{"destination_pod":["a"],"verdict":["FORWARDED"]}`}},
		{args: "--not --ip 1.2.3.4 -n x", allow: []string{`{"source_pod":["x/"]}`, `{"destination_pod":["x/"]}`}, deny: []string{`{"source_ip":["1.2.3.4"]}`, `{"destination_ip":["1.2.3.4"]}`}},
		{args: "--ip 10.0.0.1 --port 80", allow: []string{`{"source_ip":["10.0.0.1"],"source_port":["80"]}`, `{"destination_ip":["10.0.0.1"],"destination_port":["80"]}`}},
		{args: "-A", allow: []string{`{"source_pod":["/"]}`, `{"destination_pod":["/"]}`}},
		{args: "--from-all-namespaces --from-pod a", allow: []string{`{"source_pod":["/a"]}`}},
		{args: "--from-namespace x --from-pod a --from-service b", allow: []string{`{"source_pod":["x/a"],"source_service":["x/b"]}`}},
		{args: "--to-namespace x --to-pod x/a", allow: []string{`{"destination_pod":["x/a"]}`}},
		{args: "-n x --service a", allow: []string{`{"source_service":["x/a"]}`, `{"destination_service":["x/a"]}`}},
		{args: "--workload Deployment/a --workload b", allow: []string{`{"source_workload":[{"name":"a","kind":"Deployment"},{"name":"b"}]}`, `{"destination_workload":[{"name":"a","kind":"Deployment"},{"name":"b"}]}`}},
		{args: "--label app=a -l b", allow: []string{`{"source_label":["app=a","b"]}`, `{"destination_label":["app=a","b"]}`}},
		{args: "--identity world --identity 0x10", allow: []string{`{"source_identity":[2,16]}`, `{"destination_identity":[2,16]}`}},
		{args: "--snat-ip 1.1.1.1", allow: []string{`{"source_ip_xlated":["1.1.1.1"]}`}},
		{args: "-4 -6", allow: []string{`{"ip_version":["IPv4","IPv6"]}`}},
		{args: "--ip-version ip6 --ip-version none", allow: []string{`{"ip_version":["IPv6","IP_NOT_USED"]}`}},
		{args: "--fqdn *.example.com", allow: []string{`{"source_fqdn":["*.example.com"]}`, `{"destination_fqdn":["*.example.com"]}`}},
		{args: "--from-cluster a", allow: []string{`{"source_cluster_name":["a"]}`}},
		{args: "--protocol TCP --tcp-flags syn,ACK --tcp-flags fin", allow: []string{`{"protocol":["TCP"],"tcp_flags":[{"SYN":true,"ACK":true},{"FIN":true}]}`}},
		{args: "-t drop -t trace:to-network -t 4:7 -t l7 -t agent:policy-updated -t 5", allow: []string{`{"event_type":[{"type":1},{"type":4,"match_sub_type":true,"sub_type":11},{"type":4,"match_sub_type":true,"sub_type":7},{"type":129},{"type":130,"match_sub_type":true,"sub_type":5},{"type":5}]}`}},
		{args: "--verdict DROPPED --verdict forwarded", allow: []string{`{"verdict":["DROPPED","FORWARDED"]}`}},
		{args: "--drop-reason-desc POLICY_DENIED --drop-reason-desc Authentication␣required", allow: []string{`{"drop_reason_desc":["POLICY_DENIED","AUTH_REQUIRED"]}`}},
		{args: "--http-status 5+ --http-method get --http-path /a --http-url b --http-header a:b:c", allow: []string{`{"http_status_code":["5+"],"http_method":["get"],"http_path":["/a"],"http_url":["b"],"http_header":[{"key":"a","value":"b:c"}]}`}},
		{args: "--trace-id t --ip-trace-id 7 --uuid u", allow: []string{`{"uuid":["u"],"trace_id":["t"],"ip_trace_id":["7"]}`}},
		{args: "--node-name n --node-label a=b --interface eth0 --traffic-direction Ingress", allow: []string{`{"traffic_direction":["INGRESS"],"interface":[{"name":"eth0"}],"node_name":["n"],"node_labels":["a=b"]}`}},
		{args: "--encrypted --not --unencrypted", allow: []string{`{"encrypted":[true]}`}, deny: []string{`{"encrypted":[false]}`}},
		{args: "--cel-expression _flow.x=='a'", allow: []string{`{"experimental":{"cel_expression":["_flow.x==''a''"]}}`}},
		{args: "--http-path a<b&c>", allow: []string{`{"http_path":["a\u003cb\u0026c\u003e"]}`}},
		{args: "--cluster prod-*", allow: []string{`{"experimental":{"cel_expression":["_flow.source.cluster_name.matches(\"^(prod-.*)$\")"]}}`, `{"experimental":{"cel_expression":["_flow.destination.cluster_name.matches(\"^(prod-.*)$\")"]}}`}},
		{args: "--to-cluster a.b* --to-cluster c --cel-expression true --cel-expression false", allow: []string{`{"experimental":{"cel_expression":["_flow.destination.cluster_name.matches(\"^(a\\\\.b.*|c)$\") \u0026\u0026 ((true) || (false))"]}}`}},
	}
	for _, tt := range tests {
		t.Run(tt.args, func(t *testing.T) {
			args := strings.Fields(tt.args)
			for i := range args {
				args[i] = strings.ReplaceAll(args[i], "␣", " ")
			}
			b, err := parse(args)
			if err != nil {
				t.Fatal(err)
			}
			want := yaml(tt.allow, tt.deny)
			if got := raw(t, b); got != want {
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
			// Asking twice gives the same: namespaces are not applied twice.
			if got := raw(t, b); got != want {
				t.Errorf("second time\n%s\nwant\n%s", got, want)
			}
		})
	}
}

func TestErrors(t *testing.T) {
	tests := []struct {
		args string
		want string
	}{
		{"--ip 1.2.3.4 -n x", `invalid argument "x" for "-n, --namespace" flag: filters --ip and --namespace cannot be combined`},
		{"-n x --ip 1.2.3.4", `invalid argument "1.2.3.4" for "--ip" flag: filters --ip and --namespace cannot be combined`},
		{"--ip 1.2.3.4 --pod a", `invalid argument "a" for "--pod" flag: filters --ip and --pod cannot be combined`},
		{"--to-pod a -A", `invalid argument "true" for "-A, --all-namespaces" flag: filters --to-pod and --all-namespaces cannot be combined`},
		{"--port 1 --to-port 2", `invalid argument "2" for "--to-port" flag: filters --port and --to-port cannot be combined`},
		{"--workload a --from-workload b", `invalid argument "b" for "--from-workload" flag: filters --workload and --from-workload cannot be combined`},
		{"--not --label a --not --to-label b", `invalid argument "b" for "--to-label" flag: filters --label and --to-label cannot be combined`},
		{"--encrypted --unencrypted", `invalid argument "true" for "--unencrypted" flag: filters --encrypted and --unencrypted cannot be combined`},
		{"--encrypted=false", `invalid argument "false" for "--encrypted" flag: this filter takes no value; --not in front of it negates`},
		{"-n x --service y/a", `invalid argument "y/a" for "--service" flag: namespace conflict: "x" does not contain "y/a"`},
		{"--from-pod x/a --from-service y/b", `invalid argument "y/b" for "--from-service" flag: namespace of service "y/b" conflict with pod "x"`},
		{"--http-header c", `invalid argument "c" for "--http-header" flag: invalid http-header value "c", expected name:value`},
		{"--verdict x", `invalid argument "x" for "--verdict" flag: invalid --verdict value: x`},
		{"--drop-reason-desc x", `invalid argument "x" for "--drop-reason-desc" flag: invalid --drop-reason-desc value: x`},
		{"--type foo", `invalid argument "foo" for "-t, --type" flag: unable to parse type 'foo', not a known type name and unable to parse as numeric value: strconv.ParseUint: parsing "foo": invalid syntax`},
		{"--type drop:foo", `invalid argument "drop:foo" for "-t, --type" flag: unable to parse event sub-type 'foo', not a known sub-type name and unable to parse as numeric value: strconv.ParseUint: parsing "foo": invalid syntax`},
		{"--tcp-flags x", `invalid argument "x" for "--tcp-flags" flag: unknown tcp flag: x`},
		{"--identity foo", `invalid argument "foo" for "--identity" flag: invalid security identity, expected one of [host world unmanaged health init remote-node kube-apiserver ingress world-ipv4 world-ipv6] or a numeric value`},
		{"--traffic-direction Up", `invalid argument "Up" for "--traffic-direction" flag: up: invalid traffic direction, expected ingress or egress`},
		{"--ip-trace-id 0", `invalid argument "0" for "--ip-trace-id" flag: invalid --ip-trace-id value; must be greater than 0`},
		{"--not", "trailing --not found in the arguments"},
		{"--not --not --pod a", `invalid argument "true" for "--not" flag: consecutive --not statements`},
	}
	for _, tt := range tests {
		t.Run(tt.args, func(t *testing.T) {
			_, err := parse(strings.Fields(tt.args))
			if err == nil || err.Error() != tt.want {
				t.Errorf("got  %v\nwant %s", err, tt.want)
			}
		})
	}
}

// The groups hold within one list only: the same pair is fine across allow and deny.
func TestExclusiveGroupsPerList(t *testing.T) {
	values := map[string]string{"encrypted": "", "unencrypted": "", "all-namespaces": "", "from-all-namespaces": "", "to-all-namespaces": "", "identity": "1", "from-identity": "1", "to-identity": "1"}
	arg := func(name string) string {
		v, ok := values[name]
		if !ok {
			v = "x"
		}
		if v == "" {
			return "--" + name
		}
		return "--" + name + "=" + v
	}
	for _, group := range exclusive {
		for i, a := range group {
			for _, b := range group[i+1:] {
				if _, err := parse([]string{arg(a), arg(b)}); err == nil || !strings.Contains(err.Error(), "cannot be combined") {
					t.Errorf("--%s --%s: %v", a, b, err)
				}
				if _, err := parse([]string{"--not", arg(a), "--not", arg(b)}); err == nil || !strings.Contains(err.Error(), "cannot be combined") {
					t.Errorf("--not --%s --not --%s: %v", a, b, err)
				}
				if _, err := parse([]string{arg(a), "--not", arg(b)}); err != nil {
					t.Errorf("--%s --not --%s: %v", a, b, err)
				}
			}
		}
	}
}

func TestEveryFlagHasASetter(t *testing.T) {
	var names []string
	for _, h := range flagHelps {
		names = append(names, h.name)
		if _, ok := setters[h.name]; !ok && h.name != "not" {
			t.Errorf("--%s has no setter", h.name)
		}
	}
	for name := range setters {
		if !slices.Contains(names, name) {
			t.Errorf("setter %s has no flag", name)
		}
	}
	for name, values := range Completions() {
		for _, v := range values {
			if _, err := parse([]string{"--" + name + "=" + v}); err != nil {
				t.Errorf("completion --%s=%s: %v", name, v, err)
			}
		}
	}
}

func TestParseRaw(t *testing.T) {
	got, err := ParseRaw([]string{`{"source_pod":["a"]} {"verdict":["DROPPED"]}`, ` {"sourceIp":["1.1.1.1"]} `, ``})
	if err != nil || len(got) != 3 {
		t.Fatalf("%v, %v", got, err)
	}
	var out bytes.Buffer
	if err := WriteRaw(&out, nil, got); err != nil {
		t.Fatal(err)
	}
	want := yaml(nil, []string{`{"source_pod":["a"]}`, `{"verdict":["DROPPED"]}`, `{"source_ip":["1.1.1.1"]}`})
	if out.String() != want {
		t.Errorf("got\n%swant\n%s", out.String(), want)
	}
	for in, want := range map[string]string{
		"x":                    "failed to decode 'x': invalid character 'x' looking for beginning of value",
		`{"verdict":["GONE"]}`: "invalid value for enum field verdict",
		`{"nothing":1}`:        `unknown field "nothing"`,
		`{`:                    "unexpected EOF",
	} {
		if _, err := ParseRaw([]string{in}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", in, err, want)
		}
	}
}

// FuzzFlags holds that whatever flags are accepted print as filters that read back the same.
func FuzzFlags(f *testing.F) {
	for _, s := range []string{"--pod\x00a", "-n\x00x\x00--to-port\x0080", "--not\x00--verdict\x00DROPPED", "-t\x00trace:to-endpoint", "--http-header\x00a:b", "--cluster\x00p*'\"", "--tcp-flags\x00syn,ack", "--cel-expression\x00'\u2028\x7f\U000e0001"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, joined string) {
		b, err := parse(strings.Split(joined, "\x00"))
		if err != nil {
			return
		}
		for _, filter := range append(b.Allow(), b.Deny()...) {
			text, err := JSON(filter)
			if err != nil {
				// Flags may hold bytes that are no UTF-8; such a filter is refused before it is sent.
				if strings.Contains(err.Error(), "UTF-8") {
					return
				}
				t.Fatalf("%v: %v", filter, err)
			}
			back, err := ParseRaw([]string{text})
			if err != nil || len(back) != 1 || !proto.Equal(back[0], filter) {
				t.Fatalf("%s reads back as %v, %v", text, back, err)
			}
		}
	})
}
