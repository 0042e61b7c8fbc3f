// SPDX-License-Identifier: Apache-2.0

package httpload

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
)

func TestAnswerSize(t *testing.T) {
	for _, tt := range []struct {
		name, in string
		size     int
		err      error
	}{
		{"nothing yet", "", 0, nil},
		{"head not complete", "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n", 0, nil},
		{"complete", "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", 41, nil},
		{"body to come, name in lower case", "HTTP/1.1 200 OK\r\ncontent-length:3\r\nx: y\r\n\r\n", 46, nil},
		{"refused", "HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n", 0, errStatus},
		{"no length", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", 0, errAnswer},
		{"length of something else", "HTTP/1.1 200 OK\r\nX-Content-Length: 3\r\n\r\n", 0, errAnswer},
		{"length without digits", "HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", 0, errAnswer},
		{"length beyond belief", "HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n", 0, errAnswer},
		{"not HTTP", "SSH-2.0-x\r\n\r\n", 0, errAnswer},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if size, err := answerSize([]byte(tt.in)); size != tt.size || !errors.Is(err, tt.err) {
				t.Errorf("got %d, %v, want %d, %v", size, err, tt.size, tt.err)
			}
		})
	}
}

// FuzzAnswerSize: what is taken for an answer, net/http takes for one of the same size.
func FuzzAnswerSize(f *testing.F) {
	f.Add([]byte("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 3\r\n\r\nabc"))
	f.Add([]byte("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"))
	f.Fuzz(func(t *testing.T, in []byte) {
		size, err := answerSize(in)
		if size < 0 || err != nil && size != 0 || size > len(in)+maxAnswer {
			t.Fatalf("%q: %d, %v", in, size, err)
		}
		head, _, complete := bytes.Cut(in, headEnd)
		if err != nil || size == 0 || size > len(in) || bytes.Count(head, []byte("\n")) != bytes.Count(head, []byte("\r\n")) {
			return // net/http also ends lines without a carriage return
		}
		if !complete {
			t.Fatalf("%q has no head", in)
		}
		response, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(in[:size])), nil)
		if err != nil || strings.Count(strings.ToLower(string(head)), "content-length") > 1 || len(response.TransferEncoding) > 0 {
			return // stricter than a load needs to be
		}
		defer response.Body.Close()
		read, err := io.ReadAll(response.Body)
		if want := size - len(head) - len(headEnd); err != nil || response.StatusCode == http.StatusOK && len(read) != want {
			t.Errorf("%q: a body of %d, net/http read %d, %v", in, want, len(read), err)
		}
	})
}
