// SPDX-License-Identifier: Apache-2.0

package policy

// FilterKind is what speaks on a filtered connection; numbers as weir.policy.v1.FilterKind.
type FilterKind uint8

// Kinds.
const (
	FilterHTTP FilterKind = 1
	FilterTLS  FilterKind = 2
	FilterDNS  FilterKind = 3
)

// Filter is what becomes of requests on connections that are allowed through a proxy: a request passes when any item accepts it. It is never changed.
type Filter struct {
	// Key is made of the subject's identity, direction, protocol, ports and the names of the rules that cover them, not of what they say: an edit of a
	// rule keeps it. At most 63 characters, such as "http-6f1d...".
	Key       string
	Kind      FilterKind
	Direction Direction
	// Visibility: only to be seen; everything passes, and there are no items.
	Visibility bool
	// HTTP of a FilterHTTP. No items at all, here and in DNS, let nothing pass.
	HTTP []HTTPItem
	// DNS of a FilterDNS.
	DNS []DNSItem
	// TLS of a FilterTLS. A FilterHTTP may have them, too: they are for connections with TLS, which pass unread.
	TLS []TLSItem
}

// HTTPItem is one item; Rule is a position in Resolved.Rules. The zero HTTPRule accepts every request.
type HTTPItem struct {
	Rule int
	HTTPRule
}

// DNSItem is one item: a name that either member matches. Both empty = every name.
type DNSItem struct {
	Rule int
	NameSelector
}

// TLSItem accepts connections with one of the server names; Any = every connection, with TLS or without.
type TLSItem struct {
	Rule        int
	Any         bool
	ServerNames []string
}

// Visibility is one part of a proxy-visibility annotation (spec 15).
type Visibility struct {
	Direction Direction
	Port      uint16
	Proto     uint8 // TCP, UDP or SCTP
	Kind      FilterKind
}
