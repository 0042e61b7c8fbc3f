// SPDX-License-Identifier: Apache-2.0

package dnswire

import "encoding/binary"

// replyUDPSize is what the proxy says of itself in OPT records.
const replyUDPSize = 1232

// AppendReply appends an answer without records to a query, which was read by ReadQuery without ErrIgnore.
func AppendReply(out, query []byte, q *Query, rcode int) []byte {
	return appendReply(out, query, q, rcode, 0)
}

// AppendTruncated appends an answer that sends the client to TCP.
func AppendTruncated(out, query []byte, q *Query) []byte {
	return appendReply(out, query, q, RCodeSuccess, flagTruncated)
}

func appendReply(out, query []byte, q *Query, rcode int, more uint16) []byte {
	flags := binary.BigEndian.Uint16(query[2:])&(opcodeMask|flagDesired) | flagResponse | flagAvailable | more | uint16(rcode)
	out = append(out, query[:2]...)
	out = binary.BigEndian.AppendUint16(out, flags)
	var questions, additional uint16
	if len(q.Wire) > 0 {
		questions = 1
	}
	if q.EDNS {
		additional = 1
	}
	for _, n := range []uint16{questions, 0, 0, additional} {
		out = binary.BigEndian.AppendUint16(out, n)
	}
	out = append(out, q.Wire...)
	if q.EDNS {
		out = append(out, 0)
		out = binary.BigEndian.AppendUint16(out, TypeOPT)
		out = binary.BigEndian.AppendUint16(out, replyUDPSize)
		out = append(out, 0, 0, 0, 0, 0, 0) // version 0, no flags, no options
	}
	return out
}
