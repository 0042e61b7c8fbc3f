// SPDX-License-Identifier: Apache-2.0

// Package resource reads what the configuration's messages have in common: extensions, addresses, socket options.
package resource

import (
	"fmt"
	"net/netip"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/weirmesh/weir/services/proxy/internal/fields"
	"github.com/weirmesh/weir/services/proxy/internal/sockets"
)

// Unpack decodes an extension's configuration; another type than want's is refused by its name.
func Unpack(path string, config *anypb.Any, want proto.Message) error {
	if config == nil {
		return fmt.Errorf("%s: no typed_config", path)
	}
	if !config.MessageIs(want) {
		return fmt.Errorf("%s: type %q is not supported here", path, config.GetTypeUrl())
	}
	if err := config.UnmarshalTo(want); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// Prefix compiles an address range.
func Prefix(path string, in *corev3.CidrRange) (netip.Prefix, error) {
	addr, err := netip.ParseAddr(in.GetAddressPrefix())
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("%s: %w", path, err)
	}
	length := in.GetPrefixLen().GetValue()
	if length > 128 {
		return netip.Prefix{}, fmt.Errorf("%s: prefix length %d", path, length)
	}
	prefix, err := addr.Prefix(int(length))
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("%s: %w", path, err)
	}
	return prefix, nil
}

// Address compiles a TCP address given by number.
func Address(path string, in *corev3.Address) (netip.AddrPort, error) {
	socket := in.GetSocketAddress()
	if socket == nil {
		return netip.AddrPort{}, fmt.Errorf("%s: not a socket address", path)
	}
	path = fields.Join(path, "socket_address")
	if err := fields.Only(socket, path, "protocol", "address", "port_value", "ipv4_compat"); err != nil {
		return netip.AddrPort{}, err
	}
	if socket.GetProtocol() != corev3.SocketAddress_TCP {
		return netip.AddrPort{}, fmt.Errorf("%s: protocol %s is not supported", path, socket.GetProtocol())
	}
	addr, err := netip.ParseAddr(socket.GetAddress())
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("%s: %w", path, err)
	}
	if socket.GetPortValue() > 65535 {
		return netip.AddrPort{}, fmt.Errorf("%s: port %d", path, socket.GetPortValue())
	}
	return netip.AddrPortFrom(addr.Unmap(), uint16(socket.GetPortValue())), nil
}

// Options compiles socket options.
func Options(path string, in []*corev3.SocketOption) ([]sockets.Option, error) {
	var out []sockets.Option
	for i, o := range in {
		at := fields.Index(path, "socket_options", i)
		if err := fields.Only(o, at, "description", "level", "name", "int_value", "buf_value", "state"); err != nil {
			return nil, err
		}
		option := sockets.Option{Level: int(o.GetLevel()), Name: int(o.GetName())}
		switch v := o.GetValue().(type) {
		case *corev3.SocketOption_IntValue:
			option.Value = int(v.IntValue)
		case *corev3.SocketOption_BufValue:
			option.Bytes = v.BufValue
		default:
			return nil, fmt.Errorf("%s: no value", at)
		}
		out = append(out, option)
	}
	return out, nil
}

// Duration returns a duration, or a default if it is absent; negative ones are refused.
func Duration(path string, in *durationpb.Duration, absent time.Duration) (time.Duration, error) {
	if in == nil {
		return absent, nil
	}
	if err := in.CheckValid(); err != nil {
		return 0, fmt.Errorf("%s: %w", path, err)
	}
	if in.AsDuration() < 0 {
		return 0, fmt.Errorf("%s: negative", path)
	}
	return in.AsDuration(), nil
}
