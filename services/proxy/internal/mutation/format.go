// SPDX-License-Identifier: Apache-2.0

package mutation

import (
	"fmt"
	"strings"

	"github.com/weirmesh/weir/services/proxy/internal/match"
)

// Format makes a text from a request: Envoy's substitution format, as far as it is known here.
type Format func(*match.Request) string

// CompileFormat compiles a text with commands such as %REQ(name)%. Commands that are not known are refused by name.
func CompileFormat(text, path string) (Format, error) {
	if !strings.Contains(text, "%") {
		return func(*match.Request) string { return text }, nil
	}
	var parts []Format
	for text != "" {
		plain, rest, found := strings.Cut(text, "%")
		if plain != "" {
			parts = append(parts, func(*match.Request) string { return plain })
		}
		if !found {
			break
		}
		command, after, closed := strings.Cut(rest, "%")
		if !closed {
			return nil, fmt.Errorf("%s: lone %%", path)
		}
		f, err := compileCommand(command, path)
		if err != nil {
			return nil, err
		}
		parts, text = append(parts, f), after
	}
	return func(r *match.Request) string {
		var b strings.Builder
		for _, p := range parts {
			b.WriteString(p(r))
		}
		return b.String()
	}, nil
}

func compileCommand(command, path string) (Format, error) {
	if name, ok := strings.CutPrefix(command, "REQ("); ok {
		name, ok = strings.CutSuffix(name, ")")
		if !ok || name == "" || strings.ContainsAny(name, "?:()") && !strings.HasPrefix(name, ":") {
			return nil, fmt.Errorf("%s: command %%%s%% is not supported", path, command)
		}
		name = match.CanonicalName(name)
		return func(r *match.Request) string { v, _ := r.Value(name); return v }, nil
	}
	switch command {
	case "":
		return func(*match.Request) string { return "%" }, nil
	case "DOWNSTREAM_REMOTE_ADDRESS":
		return func(r *match.Request) string { return r.Conn.Remote.String() }, nil
	case "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT":
		return func(r *match.Request) string { return r.Conn.Remote.Addr().String() }, nil
	case "DOWNSTREAM_LOCAL_ADDRESS":
		return func(r *match.Request) string { return r.Conn.Local.String() }, nil
	case "DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT":
		return func(r *match.Request) string { return r.Conn.Local.Addr().String() }, nil
	case "REQUESTED_SERVER_NAME":
		return func(r *match.Request) string { return r.Conn.ServerName }, nil
	}
	return nil, fmt.Errorf("%s: command %%%s%% is not supported", path, command)
}
