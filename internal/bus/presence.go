// SPDX-License-Identifier: Apache-2.0

package bus

import (
	"encoding/json"
	"fmt"
	"time"
)

// PresenceInterval is how often a relay repeats its word of a connected agent.
const PresenceInterval = 5 * time.Second

// Presence is a relay's word of one agent, on NodeSubject of its node. It is repeated every
// PresenceInterval while the agent is connected, and said once more when it leaves.
type Presence struct {
	Cluster string `json:"cluster"`
	Node    string `json:"node"`
	// Relay tells the relays apart: an agent that moves is connected to one while another sees it go.
	Relay string `json:"relay"`
	// Address is where the agent's connection comes from.
	Address string `json:"address"`
	// ServerName is the name in the agent's certificate.
	ServerName string `json:"server_name"`
	Connected  bool   `json:"connected"`
}

// Encode returns the message.
func (p Presence) Encode() ([]byte, error) {
	data, err := json.Marshal(p)
	if err != nil {
		return nil, fmt.Errorf("encode presence: %w", err)
	}
	return data, nil
}

// maxPresence bounds a message from outside.
const maxPresence = 4096

// DecodePresence reads a message.
func DecodePresence(data []byte) (Presence, error) {
	if len(data) > maxPresence {
		return Presence{}, fmt.Errorf("presence has %d bytes", len(data))
	}
	var p Presence
	if err := json.Unmarshal(data, &p); err != nil {
		return Presence{}, fmt.Errorf("decode presence: %w", err)
	}
	if p.Node == "" || p.Relay == "" {
		return Presence{}, fmt.Errorf("presence names no node or no relay")
	}
	return p, nil
}
