// SPDX-License-Identifier: Apache-2.0

// Package version holds the version of this build.
package version

// Version is the version of every binary of this build. The linker sets it
// (-X github.com/weirmesh/weir/internal/version.Version=v1.2.3); it is written nowhere else.
var Version = "v0.1.0-dev"
