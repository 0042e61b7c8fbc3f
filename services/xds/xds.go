// SPDX-License-Identifier: Apache-2.0

// Package xds serves the configuration of the nodes' proxies.
package xds
