// SPDX-License-Identifier: Apache-2.0

package bus

import (
	natsserver "github.com/nats-io/nats-server/v2/server"

	"github.com/weirmesh/weir/internal/spiffe"
)

// rights is what a service may do on the bus, besides listening on its own inbox.
type rights struct {
	service   string
	publish   []string
	subscribe []string
}

// table is the only place that says who may do what on the bus. A user that is not in it does not
// get in. Identity may not use direct gets: they may be answered by a replica that lags, and one
// number would mean two label sets.
func table() []rights {
	const kv = "KV_" + IdentityBucket
	return []rights{
		{
			service: "relay",
			publish: []string{
				FlowSubjects,
				NodeSubjects,
				"$JS.API.INFO",
				"$JS.API.STREAM.INFO." + FlowStream,
				"$JS.API.STREAM.CREATE." + FlowStream,
				"$JS.API.STREAM.UPDATE." + FlowStream,
			},
		},
		{
			service: "observer",
			publish: []string{
				"$JS.API.INFO",
				"$JS.API.STREAM.INFO." + FlowStream,
				"$JS.API.STREAM.MSG.GET." + FlowStream,
				"$JS.API.CONSUMER.CREATE." + FlowStream,
				"$JS.API.CONSUMER.CREATE." + FlowStream + ".>",
				"$JS.API.CONSUMER.INFO." + FlowStream + ".>",
				"$JS.API.CONSUMER.DELETE." + FlowStream + ".>",
				"$JS.API.CONSUMER.MSG.NEXT." + FlowStream + ".>",
			},
			subscribe: []string{NodeSubjects},
		},
		{
			service: "identity",
			publish: []string{
				"$KV." + IdentityBucket + ".>",
				"$JS.API.INFO",
				"$JS.API.STREAM.INFO." + kv,
				"$JS.API.STREAM.CREATE." + kv,
				"$JS.API.STREAM.UPDATE." + kv,
				"$JS.API.STREAM.MSG.GET." + kv,
				"$JS.API.STREAM.PURGE." + kv,
				"$JS.API.CONSUMER.CREATE." + kv,
				"$JS.API.CONSUMER.CREATE." + kv + ".>",
				"$JS.API.CONSUMER.INFO." + kv + ".>",
				"$JS.API.CONSUMER.DELETE." + kv + ".>",
				"$JS.API.CONSUMER.MSG.NEXT." + kv + ".>",
				"$JS.FC." + kv + ".>", // flow control of watches
			},
		},
	}
}

// users turns the table into the users of a NATS server, named as verify_and_map finds them: by the
// SPIFFE URI of the client's certificate.
func users(trustDomain string) []*natsserver.User {
	var all []*natsserver.User
	for _, r := range table() {
		all = append(all, &natsserver.User{
			Username: spiffe.ID{TrustDomain: trustDomain, Service: r.service}.String(),
			Permissions: &natsserver.Permissions{
				Publish:   &natsserver.SubjectPermission{Allow: r.publish},
				Subscribe: &natsserver.SubjectPermission{Allow: append([]string{inbox(r.service) + ".>"}, r.subscribe...)},
			},
		})
	}
	return all
}
