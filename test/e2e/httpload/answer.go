// SPDX-License-Identifier: Apache-2.0

package httpload

import (
	"bytes"
	"errors"
)

// What makes an answer a failure.
var (
	errStatus = errors.New("status is not 200")
	errAnswer = errors.New("no answer of HTTP/1.1 with a length")
	errClosed = errors.New("connection closed instead of an answer")
)

var (
	headEnd    = []byte("\r\n\r\n")
	statusOK   = []byte("HTTP/1.1 200")
	statusAny  = []byte("HTTP/1.")
	lengthName = []byte("\r\ncontent-length:")
)

// maxAnswer bounds what is believed of a length.
const maxAnswer = 1 << 30

// answerSize is the size of the answer that b begins with, head and body; 0 = its head is not complete. It does not allocate.
func answerSize(b []byte) (int, error) {
	end := bytes.Index(b, headEnd)
	if end < 0 {
		return 0, nil
	}
	head := b[:end]
	switch {
	case bytes.HasPrefix(head, statusOK):
	case bytes.HasPrefix(head, statusAny):
		return 0, errStatus
	default:
		return 0, errAnswer
	}
	for at := 0; at+len(lengthName) <= len(head); at++ {
		if head[at] != '\r' || !bytes.EqualFold(head[at:at+len(lengthName)], lengthName) {
			continue
		}
		n, digits := 0, 0
		for _, c := range bytes.TrimLeft(head[at+len(lengthName):], " ") {
			if c < '0' || c > '9' || n > maxAnswer {
				break
			}
			n, digits = 10*n+int(c-'0'), digits+1
		}
		if digits == 0 || n > maxAnswer {
			return 0, errAnswer
		}
		return end + len(headEnd) + n, nil
	}
	return 0, errAnswer
}
