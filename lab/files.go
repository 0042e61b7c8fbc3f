// SPDX-License-Identifier: Apache-2.0

package lab

import "github.com/weirmesh/weir/lab/internal/folder"

// ManifestFiles returns the manifest files that a path names: itself, or in a folder and below what ends in .yaml, .yml or .json.
func ManifestFiles(path string) ([]string, error) { return folder.List([]string{path}) }
