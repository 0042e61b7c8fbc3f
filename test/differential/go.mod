module github.com/weirmesh/weir/test/differential

go 1.26.0

require (
	github.com/cilium/ebpf v0.22.0
	github.com/vishvananda/netlink v1.3.1
	github.com/vishvananda/netns v0.0.5
	github.com/weirmesh/weir/bpf v0.0.0-00010101000000-000000000000
	github.com/weirmesh/weir/internal v0.0.0
	github.com/weirmesh/weir/test/reference v0.0.0
	go.yaml.in/yaml/v3 v3.0.6
	golang.org/x/sys v0.49.0
)

require (
	go.yaml.in/yaml/v2 v2.4.4 // indirect
	sigs.k8s.io/yaml v1.6.0 // indirect
)

replace (
	github.com/weirmesh/weir/bpf => ../../bpf
	github.com/weirmesh/weir/gen => ../../gen
	github.com/weirmesh/weir/internal => ../../internal
	github.com/weirmesh/weir/test/e2e => ../e2e
	github.com/weirmesh/weir/test/reference => ../reference
)
