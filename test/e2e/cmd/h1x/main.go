package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/weirmesh/weir/test/e2e/httpload"
	"github.com/weirmesh/weir/test/e2e/l7bench"
)

func main() {
	rounds := flag.Int("rounds", 2, "")
	d := flag.Duration("d", 2*time.Second, "")
	which := flag.String("which", "haproxy,old,new", "")
	log := flag.Bool("log", false, "")
	old := flag.String("old", "", "")
	nw := flag.String("new", "", "")
	rules := flag.Bool("rules", false, "")
	slow := flag.Bool("slow", false, "")
	perf := flag.String("perf", "", "perf record into this file")
	strace := flag.String("strace", "", "")
	flag.Parse()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	check(l7bench.Pin(1))
	const origin = "127.0.0.1:19500"
	go httpload.ServeOrigin(ctx, origin)
	time.Sleep(100 * time.Millisecond)
	type sum struct{ rate, cpu float64; n int }
	sums := map[string]*sum{}
	for r := range *rounds {
		for _, name := range strings.Split(*which, ",") {
			dir, _ := os.MkdirTemp("", "h1x-")
			s := l7bench.Shape{Origin: origin, First: 19600, Dir: dir, Log: *log}
			var p *l7bench.Process
			var stop func() error
			switch name {
			case "haproxy":
				q, err := l7bench.HAProxy(ctx, dir, 0, s)
				check(err)
				p, stop = q, q.Stop
			default:
				bin := *old
				if name == "new" {
					bin = *nw
				}
				q, err := l7bench.StartWeir(ctx, bin, dir, 0, s, *rules)
				check(err)
				p, stop = q.Process, q.Stop
			}
			_, err := httpload.Load(ctx, p.Address, 50, 0, *d/2, "/")
			check(err)
			var tracer *exec.Cmd
			pid := pidOf(dir, name)
			if *perf != "" {
				tracer = exec.Command("perf", "record", "-g", "-F", "999", "-o", *perf, "-p", pid)
			} else if *strace != "" {
				tracer = exec.Command("strace", "-f", "-c", "-o", *strace, "-p", pid)
			}
			if tracer != nil {
				tracer.Stderr = os.Stderr
				check(tracer.Start())
				time.Sleep(500 * time.Millisecond)
			}
			before, _ := p.CPU()
			full, err := httpload.Load(ctx, p.Address, 50, 0, *d, "/")
			check(err)
			after, _ := p.CPU()
			if tracer != nil {
				tracer.Process.Signal(os.Interrupt)
				tracer.Wait()
			}
			cpu := float64((after - before).Nanoseconds()) / float64(full.Requests) / 1000
			if sums[name] == nil {
				sums[name] = &sum{}
			}
			fmt.Printf("%d %-8s %8.0f/s cpu %.2fus failed %d n %d", r, name, full.Rate(), cpu, full.Failed, full.Requests)
			if *slow {
				sl, err := httpload.Load(ctx, p.Address, 50, 1000, 2**d, "/")
				check(err)
				fmt.Printf(" p50 %v p99 %v p999 %v", sl.Latency(.5), sl.Latency(.99), sl.Latency(.999))
			}
			fmt.Println()
			sums[name].rate += full.Rate()
			sums[name].cpu += cpu
			sums[name].n++
			stop()
			os.RemoveAll(dir)
		}
	}
	for n, s := range sums {
		fmt.Printf("mean %-8s %.0f/s %.2fus\n", n, s.rate/float64(s.n), s.cpu/float64(s.n))
	}
}

func pidOf(dir, name string) string {
	out, _ := exec.Command("pgrep", "-f", dir).Output()
	for _, p := range strings.Fields(string(out)) {
		exe, _ := os.Readlink("/proc/" + p + "/exe")
		if strings.HasSuffix(exe, "weir-proxy") || strings.HasSuffix(exe, "haproxy") {
			return p
		}
	}
	return ""
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}
