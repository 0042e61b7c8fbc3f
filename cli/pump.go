// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/weirmesh/weir/cli/internal/printer"
)

// pumpQueue is how many records wait between network and terminal. A full
// queue slows the reading, which slows the server, which counts and tells what it drops.
const pumpQueue = 1024

// pump prints what recv brings until io.EOF, an error, or the end of ctx.
// Output is written in large pieces while records come fast, and at once when
// there is nothing more to wait for.
func pump[T any](ctx context.Context, a *app, method string, opts printer.Options, recv func() (T, error), print func(*printer.Printer, T) error) error {
	out := bufio.NewWriterSize(a.Out, 64<<10)
	opts.Out = out
	p := printer.New(opts)

	// Whoever returns first ends the other: recv by ctx or by the end of the stream, print by done.
	records := make(chan T, pumpQueue)
	failed := make(chan error, 1)
	done := make(chan struct{})
	defer close(done)
	go func() {
		defer close(records)
		for {
			r, err := recv()
			if err != nil {
				failed <- err
				return
			}
			select {
			case records <- r:
			case <-done:
				return
			}
		}
	}()

	printed := 0
	for {
		var r T
		var ok bool
		select {
		case r, ok = <-records:
		default:
			// Nothing waits: show what there is.
			if err := out.Flush(); err != nil {
				return fmt.Errorf("write output: %w", err)
			}
			select {
			case r, ok = <-records:
			case <-ctx.Done():
				// A file or pipe that does not end cannot be interrupted itself.
				return errors.Join(p.Close(), out.Flush())
			}
		}
		if !ok {
			break
		}
		if err := print(p, r); err != nil {
			return err
		}
		printed++
	}
	if err := errors.Join(p.Close(), out.Flush()); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	return a.streamEnd(ctx, method, <-failed, printed)
}

// streamEnd says whether the end of a stream is a failure.
func (a *app) streamEnd(ctx context.Context, method string, err error, printed int) error {
	switch {
	case errors.Is(err, io.EOF), interrupted(ctx, err):
		return nil
	case printed > 0 && status.Code(err) == codes.Unavailable:
		return fmt.Errorf("the observer at %s ended the stream: %s", a.server.Server, status.Convert(err).Message())
	}
	return a.server.Explain(method, err)
}
