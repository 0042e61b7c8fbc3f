// SPDX-License-Identifier: Apache-2.0

package query

import (
	"testing"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	"github.com/weirmesh/weir/services/policy/internal/state"
)

// FuzzValidateConfig: whatever the document is, it is judged.
func FuzzValidateConfig(f *testing.F) {
	for _, seed := range []string{
		"kind: CiliumEnvoyConfig\nmetadata: {name: a}\nspec: {services: [{name: web}], resources: [{}]}",
		"kind: CiliumEnvoyConfig\nmetadata: 1\n", "kind: CiliumEnvoyConfig", "kind: [", "metadata: {name: 1, namespace: []}", "- kind: a", "null",
	} {
		f.Add([]byte(seed))
	}
	st := state.New("default")
	snapshot, _ := st.Commit()
	c := &cluster{frozen: st.Freeze(), snapshot: snapshot, routes: st.Routes()}
	f.Fuzz(func(t *testing.T, document []byte) {
		v := &policyv1.Validated{}
		if c.validateConfig(v, "CiliumEnvoyConfig", document); (v.GetError() == "") == (len(v.GetChanges()) == 0) {
			t.Errorf("%q: error %q, changes %q", document, v.GetError(), v.GetChanges())
		}
	})
}
