// SPDX-License-Identifier: Apache-2.0

package accesslog

import "strings"

// What RBAC says of itself in an entry.
const (
	httpRBAC    = "envoy.filters.http.rbac"
	networkRBAC = "envoy.filters.network.rbac"
	deniedWord  = "rbac_access_denied"

	shadowPolicy = "shadow_effective_policy_id"
	anyPolicy    = "effective_policy_id"
	engineResult = "enforced_engine_result"
)

// verdict is what an RBAC filter left in an entry's metadata.
type verdict struct {
	set    bool
	policy string
	denied bool
}

// verdicts are those of both kinds of filters.
type verdicts struct{ http, network verdict }

// decodeMetadata reads a Metadata.
func decodeMetadata(raw []byte) (verdicts, error) {
	var all verdicts
	err := fields(raw, func(x field) error {
		if x.tag != metadataFilter {
			return nil
		}
		name, value, err := mapEntry(x.bytes)
		if err != nil {
			return err
		}
		switch string(name) {
		case httpRBAC:
			all.http, err = decodeVerdict(value)
		case networkRBAC:
			all.network, err = decodeVerdict(value)
		}
		return err
	})
	return all, err
}

// mapEntry reads an entry of a map of messages.
func mapEntry(raw []byte) (key, value []byte, err error) {
	var v part
	err = fields(raw, func(x field) error {
		switch x.tag {
		case mapKey:
			return x.text(&key)
		case mapValue:
			v.add(x.bytes)
		}
		return nil
	})
	return key, v.raw, err
}

// decodeVerdict reads the Struct that a filter left.
func decodeVerdict(raw []byte) (verdict, error) {
	var all []pair
	err := fields(raw, func(x field) error {
		if x.tag != structFields {
			return nil
		}
		key, value, err := mapEntry(x.bytes)
		if err != nil {
			return err
		}
		p := pair{key: key}
		err = fields(value, func(x field) error {
			switch x.tag {
			case valueText:
				return x.text(&p.value)
			case valueNull, valueNumber, valueBool, valueStruct, valueList:
				p.value = nil
			}
			return nil
		})
		all = append(all, p)
		return err
	})
	if err != nil {
		return verdict{}, err
	}
	result, _ := find(all, engineResult)
	return verdict{set: true, policy: effective(all), denied: string(result) == "denied"}, nil
}

// effective finds the policy that decided: of shadow rules first, as only those name the one that allows. Of several the first by name counts.
func effective(all []pair) string {
	var best, of string
	shadow := false
	for _, p := range all {
		key := string(p.key)
		value, _ := find(all, key)
		isShadow := strings.HasSuffix(key, shadowPolicy)
		if len(value) == 0 || !strings.HasSuffix(key, anyPolicy) || shadow && !isShadow {
			continue
		}
		if best == "" || isShadow && !shadow || key < of {
			best, of, shadow = string(value), key, isShadow
		}
	}
	return best
}
