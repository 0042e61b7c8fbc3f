// SPDX-License-Identifier: Apache-2.0

// Package poll asks for a page again and again, as the article's curl loop does.
package poll

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"time"
)

// Run gets the page every period, each time over a new connection, and writes a line for each answer until ctx ends.
func Run(ctx context.Context, out io.Writer, page string, period time.Duration) error {
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 10 * time.Second}
	tick := time.NewTicker(period)
	defer tick.Stop()
	for {
		start := time.Now()
		status, err := get(ctx, client, page)
		if err != nil {
			status = err.Error()
		}
		fmt.Fprintf(out, "%s %s %s\n", page, status, time.Since(start).Round(time.Millisecond))
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func get(ctx context.Context, client *http.Client, page string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, page, nil)
	if err != nil {
		return "", err
	}
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, io.LimitReader(resp.Body, 1<<20)); err != nil {
		return "", err
	}
	return resp.Status, nil
}
