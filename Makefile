# Weir. `make help` lists the targets. Everything runs as root on Debian with Go and make.
SHELL := /bin/bash
export PATH := $(CURDIR)/bin/tools:$(PATH)

# Modules in the order of their dependencies; go.work lists the same.
MODULES := gen internal bpf services/agent services/policy services/identity services/relay services/observer cli lab examples/todo examples/todo/coredns test/e2e
PRESENT := $(foreach m,$(MODULES),$(if $(wildcard $(m)/go.mod),$(m)))
VERSION := $(shell git describe --always --dirty 2>/dev/null || echo unknown)
LDFLAGS := -s -w -X github.com/weirmesh/weir/internal/version.Version=$(VERSION) -X main.version=$(VERSION)
CLANG   := clang-19

.PHONY: help build generate generate-proto generate-bpf tools deps test lint bench demo clean check-stale

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

clean: ## remove built binaries
	rm -rf bin
