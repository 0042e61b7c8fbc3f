// SPDX-License-Identifier: Apache-2.0

// Command todo is the sample application in one binary: todo ui, todo backend, todo client.
package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/weirmesh/weir/examples/todo/backend"
	"github.com/weirmesh/weir/examples/todo/poll"
	"github.com/weirmesh/weir/examples/todo/ui"
)

const usage = `usage: todo ui|backend|client

ui       serves the page on TODO_LISTEN (default :8090) from TODO_BACKEND (default http://todobackend:8080)
backend  serves the list on TODO_LISTEN (default :8080)
client   gets TODO_URL (default http://todoui:8090/) every TODO_PERIOD (default 2s)`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "todo:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) != 1 {
		return errors.New(usage)
	}
	switch args[0] {
	case "ui":
		s := &ui.Server{
			Backend: env("TODO_BACKEND", "http://todobackend:8080"),
			Stress:  3 * time.Second,
			// A new connection for each request: the flow log shows every one from SYN to FIN.
			Client: &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 5 * time.Second},
		}
		return serve(ctx, env("TODO_LISTEN", ":8090"), s.Handler())
	case "backend":
		return serve(ctx, env("TODO_LISTEN", ":8080"), backend.New().Handler())
	case "client":
		period, err := time.ParseDuration(env("TODO_PERIOD", "2s"))
		if err != nil || period <= 0 {
			return fmt.Errorf("TODO_PERIOD: want a duration above 0, such as 2s")
		}
		return poll.Run(ctx, os.Stdout, env("TODO_URL", "http://todoui:8090/"), period)
	}
	return errors.New(usage)
}

func env(name, value string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return value
}

func serve(ctx context.Context, listen string, h http.Handler) error {
	s := &http.Server{Addr: listen, Handler: h, ReadHeaderTimeout: 5 * time.Second, MaxHeaderBytes: 16 << 10}
	context.AfterFunc(ctx, func() {
		end, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		_ = s.Shutdown(end)
	})
	fmt.Println("serving on", listen)
	if err := s.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
