module github.com/weirmesh/weir/test/cases

go 1.26.0

require (
	github.com/weirmesh/weir/gen v0.0.0
	github.com/weirmesh/weir/test/e2e v0.0.0-00010101000000-000000000000
	go.yaml.in/yaml/v3 v3.0.6
	golang.org/x/net v0.62.0
	golang.org/x/sync v0.24.0
	golang.org/x/sys v0.49.0
	google.golang.org/grpc v1.85.0
)

require (
	golang.org/x/text v0.43.0 // indirect
	google.golang.org/genproto/googleapis/rpc v0.0.0-20260928230214-8a89bd6388cc // indirect
	google.golang.org/protobuf v1.36.12 // indirect
)

replace github.com/weirmesh/weir/gen => ../../gen

replace github.com/weirmesh/weir/test/e2e => ../e2e

replace github.com/weirmesh/weir/internal => ../../internal
