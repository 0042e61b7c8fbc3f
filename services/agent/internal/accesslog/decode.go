// SPDX-License-Identifier: Apache-2.0

package accesslog

// entry is what of an HTTPAccessLogEntry or TCPAccessLogEntry makes a flow. Its texts are parts of the message.
type entry struct {
	common   common
	request  request
	response response
	protocol int32
	all      []pair // of the request, when headers has listed them
}

// common is AccessLogCommon.
type common struct {
	remote, local                     part // Address
	start                             moment
	lastTx, duration, firstTx, lastRx moment
	metadata                          part
	tags                              []pair
	serverName, details, streamID     []byte
	kind                              int32
}

// request is HTTPRequestProperties.
type request struct {
	set                                  bool
	method                               int32
	scheme, authority, path              []byte
	userAgent, referer, forwarded, theID []byte
	headers                              []pair
}

// response is HTTPResponseProperties.
type response struct {
	code              uint32
	details           []byte
	headers, trailers []pair
}

// reset empties an entry and keeps its room.
func (e *entry) reset() {
	*e = entry{common: common{tags: e.common.tags[:0]}, request: request{headers: e.request.headers[:0]},
		response: response{headers: e.response.headers[:0], trailers: e.response.trailers[:0]}, all: e.all[:0]}
}

// decode reads an entry; those of TCP have the common part alone.
func (e *entry) decode(raw []byte, tcp bool) error {
	e.reset()
	return fields(raw, func(x field) error {
		switch {
		case x.tag == entryCommon:
			return e.common.merge(x.bytes)
		case tcp:
		case x.tag == entryProtocol:
			e.protocol = int32(x.number) //nolint:gosec // as the generated code cuts it
		case x.tag == entryRequest:
			return e.request.merge(x.bytes)
		case x.tag == entryResponse:
			return e.response.merge(x.bytes)
		}
		return nil
	})
}

func (c *common) merge(raw []byte) error {
	return fields(raw, func(x field) error {
		switch x.tag {
		case commonRemote:
			c.remote.add(x.bytes)
		case commonLocal:
			c.local.add(x.bytes)
		case commonTLS:
			return fields(x.bytes, func(x field) error {
				if x.tag == tlsServerName {
					return x.text(&c.serverName)
				}
				return nil
			})
		case commonStart:
			return c.start.merge(x.bytes)
		case commonLastTx:
			return c.lastTx.merge(x.bytes)
		case commonDuration:
			return c.duration.merge(x.bytes)
		case commonFirstTx:
			return c.firstTx.merge(x.bytes)
		case commonLastRx:
			return c.lastRx.merge(x.bytes)
		case commonMetadata:
			c.metadata.add(x.bytes)
		case commonTags:
			return add(&c.tags, x.bytes)
		case commonDetails:
			return x.text(&c.details)
		case commonStreamID:
			return x.text(&c.streamID)
		case commonType:
			c.kind = int32(x.number) //nolint:gosec // as the generated code cuts it
		}
		return nil
	})
}

func (q *request) merge(raw []byte) error {
	q.set = true
	return fields(raw, func(x field) error {
		switch x.tag {
		case requestMethod:
			q.method = int32(x.number) //nolint:gosec // as the generated code cuts it
		case requestScheme:
			return x.text(&q.scheme)
		case requestAuthority:
			return x.text(&q.authority)
		case requestPath:
			return x.text(&q.path)
		case requestAgent:
			return x.text(&q.userAgent)
		case requestReferer:
			return x.text(&q.referer)
		case requestForwarded:
			return x.text(&q.forwarded)
		case requestID:
			return x.text(&q.theID)
		case requestHeaders:
			return add(&q.headers, x.bytes)
		}
		return nil
	})
}

func (r *response) merge(raw []byte) error {
	return fields(raw, func(x field) error {
		switch x.tag {
		case responseCode:
			return fields(x.bytes, func(x field) error {
				if x.tag == wrapped {
					r.code = uint32(x.number) //nolint:gosec // as the generated code cuts it
				}
				return nil
			})
		case responseHeaders:
			return add(&r.headers, x.bytes)
		case responseTrailers:
			return add(&r.trailers, x.bytes)
		case responseDetails:
			return x.text(&r.details)
		}
		return nil
	})
}

// add reads an entry of a map. Of equal keys the last one counts.
func add(to *[]pair, raw []byte) error {
	var p pair
	if err := p.decode(raw); err != nil {
		return err
	}
	*to = append(*to, p)
	return nil
}

// find looks for a key.
func find(in []pair, key string) ([]byte, bool) {
	for i := len(in) - 1; i >= 0; i-- {
		if string(in[i].key) == key {
			return in[i].value, true
		}
	}
	return nil, false
}

// socket is the SocketAddress of an Address; false = it is of another kind.
func socket(raw []byte) (ip []byte, port uint32, ok bool, err error) {
	err = fields(raw, func(x field) error {
		switch x.tag {
		case addressPipe, addressInternal:
			ip, port, ok = nil, 0, false
		case addressSocket:
			ok = true
			return fields(x.bytes, func(x field) error {
				switch x.tag {
				case socketAddress:
					return x.text(&ip)
				case socketPort:
					port = uint32(x.number) //nolint:gosec // as the generated code cuts it
				case socketNamedPort:
					port = 0 // a choice: it takes the number's place
				}
				return nil
			})
		}
		return nil
	})
	return ip, port, ok, err
}
