// SPDX-License-Identifier: Apache-2.0

// Command weir-cases plays policy cases on live labs: `weir-cases [flags] FOLDER|FILE...`. Exit code 1: something failed; 2: wrong usage.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/test/cases/format"
	"github.com/weirmesh/weir/test/cases/plan"
	"github.com/weirmesh/weir/test/cases/report"
	"github.com/weirmesh/weir/test/cases/runner"
)

// Exit codes.
const (
	exitFailed = 1
	exitUsage  = 2
)

type config struct {
	paths    []string
	only     string
	bin      string
	keep     bool
	show     bool
	verbose  bool
	parallel int
	limit    time.Duration
}

func main() {
	var c config
	flag.StringVar(&c.only, "only", "", "play only cases whose id matches this regular expression")
	flag.StringVar(&c.bin, "bin", "", "folder of Weir's programs; empty = where this one is")
	flag.BoolVar(&c.keep, "keep-lab", false, "let the labs of cases that fail run")
	flag.BoolVar(&c.show, "show", false, "print the lab of each case (flags and manifests) and play nothing")
	flag.BoolVar(&c.verbose, "v", false, "print what passed, too, and the parts' warnings")
	flag.IntVar(&c.parallel, "j", 2, "cases at a time")
	flag.DurationVar(&c.limit, "limit", 3*time.Minute, "limit of one case")
	flag.Usage = func() {
		fmt.Fprintln(os.Stderr, "usage: weir-cases [flags] FOLDER|FILE...")
		flag.PrintDefaults()
	}
	flag.Parse()
	c.paths = flag.Args()
	if len(c.paths) == 0 || c.parallel < 1 {
		flag.Usage()
		os.Exit(exitUsage)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	ok, err := run(ctx, c)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "weir-cases:", err)
		os.Exit(exitUsage)
	}
	if !ok {
		os.Exit(exitFailed)
	}
}

func run(ctx context.Context, c config) (bool, error) {
	if os.Geteuid() != 0 {
		return false, errors.New("needs root: it makes network namespaces and loads eBPF")
	}
	only, err := regexp.Compile(c.only)
	if err != nil {
		return false, fmt.Errorf("only: %w", err)
	}
	if c.bin == "" {
		self, err := os.Executable()
		if err != nil {
			return false, err
		}
		c.bin = filepath.Dir(self)
	}
	began := time.Now()
	told := report.New(os.Stdout, c.verbose)
	var cases []*format.Case
	for _, path := range c.paths {
		read, err := format.Read(path)
		if err != nil {
			told.Unreadable(err)
		}
		for _, k := range read {
			if only.MatchString(k.ID) {
				cases = append(cases, k)
			}
		}
	}
	if c.show {
		return true, show(cases)
	}
	results := make(chan *runner.Result)
	var group errgroup.Group
	group.SetLimit(c.parallel)
	go func() {
		for _, k := range cases {
			group.Go(func() error {
				results <- runner.Run(ctx, k, runner.Options{Bin: c.bin, Keep: c.keep, Limit: c.limit})
				return nil
			})
		}
		_ = group.Wait()
		close(results)
	}()
	for r := range results {
		told.Add(r)
	}
	return told.Print(time.Since(began)) && len(cases) > 0, nil
}

func show(cases []*format.Case) error {
	for _, k := range cases {
		p, err := plan.New(k, func(string) []string { return []string{"sleep", "infinity"} })
		if err != nil {
			return fmt.Errorf("%s: %w", k.ID, err)
		}
		fmt.Printf("# %s: weir-lab up %s\n%s", k.ID, strings.Join(p.Flags, " "), p.Manifests)
		for i := range k.Policies {
			document, err := format.Document(&k.Policies[i])
			if err != nil {
				return fmt.Errorf("%s: %w", k.ID, err)
			}
			fmt.Printf("---\n%s", document)
		}
	}
	return nil
}
