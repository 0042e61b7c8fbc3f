// SPDX-License-Identifier: Apache-2.0

// Package mutation adds headers to messages and removes them, as configured.
package mutation

import (
	"fmt"
	"net/http"
	"strings"

	mutationv3 "github.com/envoyproxy/go-control-plane/envoy/config/common/mutation_rules/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"golang.org/x/net/http/httpguts"

	"github.com/weirmesh/weir/services/proxy/internal/fields"
	"github.com/weirmesh/weir/services/proxy/internal/match"
)

// List of changes, done in order.
type List []change

type change struct {
	name   string
	remove bool
	action corev3.HeaderValueOption_HeaderAppendAction
	value  Format
	// keepEmpty: a value that turns out empty is still a value.
	keepEmpty bool
}

// Compile compiles the add and remove lists that routes, virtual hosts and route configurations have: what is removed is removed first. message ("request_",
// "response_" or "") begins the fields' names.
func Compile(add []*corev3.HeaderValueOption, remove []string, path, message string) (List, error) {
	out := make(List, 0, len(add)+len(remove))
	for i, name := range remove {
		canonical, err := headerName(name, fields.Index(path, message+"headers_to_remove", i))
		if err != nil {
			return nil, err
		}
		out = append(out, change{name: canonical, remove: true})
	}
	for i, o := range add {
		c, err := compileAdd(o, fields.Index(path, message+"headers_to_add", i))
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	return out, nil
}

// CompileMutations compiles the list of the header mutation filter.
func CompileMutations(list []*mutationv3.HeaderMutation, path, name string) (List, error) {
	out := make(List, 0, len(list))
	for i, m := range list {
		at := fields.Index(path, name, i)
		var c change
		var err error
		switch a := m.GetAction().(type) {
		case *mutationv3.HeaderMutation_Remove:
			c.remove = true
			c.name, err = headerName(a.Remove, fields.Join(at, "remove"))
		case *mutationv3.HeaderMutation_Append:
			c, err = compileAdd(a.Append, fields.Join(at, "append"))
		default:
			err = fields.NotSupported(fields.Join(at, "action"))
		}
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	return out, nil
}

func compileAdd(o *corev3.HeaderValueOption, path string) (change, error) {
	c := change{action: o.GetAppendAction(), keepEmpty: o.GetKeepEmptyValue()}
	//nolint:staticcheck // the deprecated form is still written
	if a := o.GetAppend(); a != nil && !a.GetValue() {
		c.action = corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD
	}
	text := o.GetHeader().GetValue()
	if raw := o.GetHeader().GetRawValue(); len(raw) > 0 {
		text = string(raw)
	}
	var err error
	if c.name, err = headerName(o.GetHeader().GetKey(), fields.Join(path, "header.key")); err != nil {
		return c, err
	}
	if !httpguts.ValidHeaderFieldValue(text) {
		return c, fmt.Errorf("%s: not a header value", fields.Join(path, "header.value"))
	}
	c.value, err = CompileFormat(text, fields.Join(path, "header.value"))
	return c, err
}

// headerName refuses what frames or routes a message: changing those would make two readings of it.
func headerName(name, path string) (string, error) {
	if !httpguts.ValidHeaderFieldName(name) {
		return "", fmt.Errorf("%s: %q is not a header that may be changed", path, name)
	}
	canonical := http.CanonicalHeaderKey(name)
	switch canonical {
	case "Host", "Content-Length", "Transfer-Encoding", "Connection", "Upgrade", "Te", "Trailer", "Keep-Alive", "Proxy-Connection":
		return "", fmt.Errorf("%s: %q is not a header that may be changed", path, name)
	}
	return canonical, nil
}

// Apply changes h; r is the request that values may speak of.
func (l List) Apply(h http.Header, r *match.Request) {
	for i := range l {
		c := &l[i]
		if c.remove {
			delete(h, c.name)
			continue
		}
		v := strings.Trim(c.value(r), " \t")
		if v == "" && !c.keepEmpty {
			continue
		}
		_, exists := h[c.name]
		switch c.action {
		case corev3.HeaderValueOption_ADD_IF_ABSENT:
			if !exists {
				h[c.name] = []string{v}
			}
		case corev3.HeaderValueOption_OVERWRITE_IF_EXISTS:
			if exists {
				h[c.name] = []string{v}
			}
		case corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD:
			h[c.name] = []string{v}
		default:
			// Never in place: other holders of the map's slices keep what they saw.
			h[c.name] = append(h[c.name][:len(h[c.name]):len(h[c.name])], v)
		}
	}
}
