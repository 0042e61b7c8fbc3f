# Weir. `make help` lists the targets. Everything runs as root on Debian with Go and make.
SHELL := /bin/bash
export PATH := $(CURDIR)/bin/tools:$(PATH)

# Modules in the order of their dependencies; go.work lists the same.
MODULES := gen internal bpf services/agent services/policy services/xds services/proxy services/identity services/relay services/observer cli lab examples/todo examples/todo/coredns test/reference test/differential test/e2e test/cases
# Those whose tests take longest, and so begin first.
LONG := bpf test/differential test/cases services/identity services/agent
PRESENT := $(foreach m,$(MODULES),$(if $(wildcard $(m)/go.mod),$(m)))
VERSION := $(shell git describe --always --dirty 2>/dev/null || echo unknown)
LDFLAGS := -s -w -X github.com/weirmesh/weir/internal/version.Version=$(VERSION) -X main.version=$(VERSION)
CLANG   := clang-19

SOAK_CASES ?= 100000
SOAK_LABS ?= 100
SOAK_REQUESTS ?= 50000
SOAK_SEED ?= $(shell date +%s)

.PHONY: help build generate generate-proto generate-bpf tools deps test policy-cases lint bench envoy-check demo clean check-stale soak

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-16s %s\n", $$1, $$2}'

build: ## build every binary into bin/
	@mkdir -p bin
	@set -e; for m in $(PRESENT); do \
	  for d in $$(cd $$m && go list -f '{{if eq .Name "main"}}{{.Dir}}{{end}}' ./...); do \
	    go build -C $$m -trimpath -ldflags '$(LDFLAGS)' -o $(CURDIR)/bin/ $$d; \
	  done; \
	done

tools: bin/tools/.stamp ## build the pinned tools (buf, protoc plugins, bpf2go)
bin/tools/.stamp: tools/go.mod tools/go.sum
	@mkdir -p bin/tools
	cd tools && GOWORK=off GOBIN=$(CURDIR)/bin/tools go install tool
	@touch $@

generate: generate-proto generate-bpf ## regenerate gen/ and the BPF objects

generate-proto: tools
	bin/tools/buf generate

generate-bpf: tools
	@command -v $(CLANG) >/dev/null || scripts/install-deps clang
	cd bpf && go generate ./...

test: build ## run every test, end-to-end ones on the lab included (root)
	@[ "$$(id -u)" = 0 ] || { echo "make test: needs root: namespaces and eBPF" >&2; exit 1; }
	@scripts/install-deps race
	@scripts/test-modules $(filter $(LONG),$(PRESENT)) $(filter-out test/e2e $(LONG),$(PRESENT))
	@echo "== bpf, the layout that upgrades are tested with"; cd bpf && go test -count=1 -tags weir_next_layout -run '^TestUpgrade' ./datapath
	@echo "== services/proxy, a tenth of the soak"; cd services/proxy && WEIR_SOAK_REQUESTS=360000 go test -count=1 -run '^TestSoak$$' ./internal/httpproxy
	@echo "== test/e2e"; cd test/e2e && go test -count=1 -timeout 20m -v ./... 2>&1 | $(CURDIR)/scripts/failed-tests; exit $${PIPESTATUS[0]}

soak: build ## policy against the reference evaluator, SOAK_CASES packets from world SOAK_SEED on, SOAK_LABS worlds on labs, SOAK_REQUESTS requests; 1,000 changes of policy under traffic; 3.6 million requests through the proxy (root)
	cd test/differential && go test -count=1 -timeout 120m -v -run '^(TestCompiler|TestDatapath|TestRequests|TestLab|TestLiveRequests)$$' . -args -cases $(SOAK_CASES) -seed $(SOAK_SEED) -labs $(SOAK_LABS) -requests $(SOAK_REQUESTS)
	cd services/proxy && WEIR_SOAK_REQUESTS=3600000 go test -count=1 -timeout 120m -v -run '^TestSoak$$' ./internal/httpproxy
	cd test/e2e && WEIR_SOAK_CHANGES=1000 go test -count=1 -timeout 60m -v -run '^TestPolicyChanges$$' .

policy-cases: build ## play the policy cases of a folder on live labs (root): make policy-cases CASES=DIR [CASES_FLAGS='-v --only PATTERN']
	@[ -n "$(CASES)" ] || { echo "make policy-cases: give CASES=DIR" >&2; exit 2; }
	@bin/weir-cases $(CASES_FLAGS) $(CASES)

lint: tools bin/tools/golangci-lint ## golangci-lint, buf lint and breaking check, C format
	@scripts/install-deps format
	bin/tools/buf lint
	bin/tools/buf format --diff --exit-code
	bin/tools/buf breaking --against proto/baseline.binpb
	clang-format-19 --dry-run -Werror $$(git ls-files 'bpf/*.c' 'bpf/*.h' | grep -v vmlinux)
	@set -e; for m in $(filter-out gen,$(PRESENT)); do echo "lint $$m"; (cd $$m && golangci-lint run --allow-parallel-runners --config $(CURDIR)/.golangci.yml ./...); done

bin/tools/golangci-lint: tools/lint/go.mod tools/lint/go.sum
	@mkdir -p bin/tools
	cd tools/lint && GOWORK=off GOBIN=$(CURDIR)/bin/tools go install tool

check-stale: generate ## fail when a generated file, a go.mod or a lone module is stale
	@git diff --exit-code --stat -- gen bpf || { echo "check-stale: run make generate and commit" >&2; exit 1; }
	@[ -z "$$(git status --porcelain -- gen bpf)" ] || { git status --short -- gen bpf; echo "check-stale: generated files are not committed" >&2; exit 1; }
	@set -e; for m in $(PRESENT); do (cd $$m && GOWORK=off go mod tidy -diff && GOWORK=off go build -o /dev/null ./...) || { echo "check-stale: module $$m" >&2; exit 1; }; done

envoy-check: build ## the L7 configuration, and its scenes, on a given Envoy binary: make envoy-check ENVOY=path (root)
	@[ -n "$(ENVOY)" ] || { echo "make envoy-check: give ENVOY=path of an Envoy binary" >&2; exit 2; }
	scripts/envoy-check "$(ENVOY)"

bench: build ## benchmarks as ratios against baselines of the same run (docs/BENCHMARKS.md)
	scripts/bench

demo: build ## a two-node cluster, a three-tier app and its flows, live; Ctrl-C ends it
	scripts/demo

clean: ## remove built binaries
	rm -rf bin
