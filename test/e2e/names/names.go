// SPDX-License-Identifier: Apache-2.0

// Package names is a DNS server with a few names, and somebody who asks it: the ends of the tests of DNS rules.
package names

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/weirmesh/weir/test/e2e/netns"
)

// record is what the server answers for a name.
type record struct {
	addresses []netip.Addr
	alias     string
	ttl       uint32
}

// zone is names in lower case, with the trailing dot.
type zone map[string]record

// parseZone reads arguments such as "api.example.com=203.0.113.5,2001:db8::5/30" and "www.example.com=api.example.com./30".
func parseZone(args []string) (zone, error) {
	z := zone{}
	for _, arg := range args {
		name, rest, ok := strings.Cut(arg, "=")
		value, ttl, has := strings.Cut(rest, "/")
		seconds := uint64(30)
		var err error
		if has {
			seconds, err = strconv.ParseUint(ttl, 10, 32)
		}
		if !ok || err != nil || value == "" {
			return nil, fmt.Errorf("record %q: expected name=address,address/ttl or name=alias./ttl", arg)
		}
		r := record{ttl: uint32(seconds)}
		if strings.HasSuffix(value, ".") {
			r.alias = strings.ToLower(value)
		} else {
			for text := range strings.SplitSeq(value, ",") {
				a, err := netip.ParseAddr(text)
				if err != nil {
					return nil, fmt.Errorf("record %q: %w", arg, err)
				}
				r.addresses = append(r.addresses, a)
			}
		}
		z[strings.ToLower(strings.TrimSuffix(name, "."))+"."] = r
	}
	return z, nil
}

// Serve answers on port 53, UDP and TCP, until ctx ends. Names that it does not have do not exist.
func Serve(ctx context.Context, args ...string) error {
	z, err := parseZone(args)
	if err != nil {
		return err
	}
	var lc net.ListenConfig
	udp, err := lc.ListenPacket(ctx, "udp", ":53")
	if err != nil {
		return fmt.Errorf("serve names: %w", err)
	}
	tcp, err := lc.Listen(ctx, "tcp", ":53")
	if err != nil {
		return errors.Join(fmt.Errorf("serve names: %w", err), udp.Close())
	}
	context.AfterFunc(ctx, func() { udp.Close(); tcp.Close() })
	go z.serveTCP(tcp)
	buf := make([]byte, 4096)
	for {
		n, from, err := udp.ReadFrom(buf)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			continue // an ICMP error of an earlier answer
		}
		if answer := z.answer(buf[:n]); answer != nil {
			_, _ = udp.WriteTo(answer, from) // who is gone asks again
		}
	}
}

func (z zone) serveTCP(listener net.Listener) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			for {
				message, err := readTCP(conn)
				if err != nil {
					return
				}
				if answer := z.answer(message); answer == nil || writeTCP(conn, answer) != nil {
					return
				}
			}
		}()
	}
}

func readTCP(r io.Reader) ([]byte, error) {
	var size [2]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return nil, fmt.Errorf("read length: %w", err)
	}
	message := make([]byte, binary.BigEndian.Uint16(size[:]))
	if _, err := io.ReadFull(r, message); err != nil {
		return nil, fmt.Errorf("read message: %w", err)
	}
	return message, nil
}

func writeTCP(w io.Writer, message []byte) error {
	_, err := w.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(message))), message...))
	return err
}

// answer makes the answer to a query; nil = it is none.
func (z zone) answer(query []byte) []byte {
	var p dnsmessage.Parser
	header, err := p.Start(query)
	if err != nil || header.Response {
		return nil
	}
	q, err := p.Question()
	if err != nil {
		return nil
	}
	name := strings.ToLower(q.Name.String())
	r, ok := z[name]
	reply := dnsmessage.Header{ID: header.ID, Response: true, Authoritative: true, RecursionDesired: header.RecursionDesired, RecursionAvailable: true}
	if !ok {
		reply.RCode = dnsmessage.RCodeNameError
	}
	b := dnsmessage.NewBuilder(nil, reply)
	b.EnableCompression()
	err = errors.Join(b.StartQuestions(), b.Question(q), b.StartAnswers())
	owner := q.Name
	for hops := 0; ok && r.alias != "" && hops < 8; hops++ {
		target, nameErr := dnsmessage.NewName(r.alias)
		err = errors.Join(err, nameErr, b.CNAMEResource(dnsmessage.ResourceHeader{Name: owner, Class: q.Class, TTL: r.ttl}, dnsmessage.CNAMEResource{CNAME: target}))
		owner = target
		r, ok = z[r.alias]
	}
	for _, a := range r.addresses {
		h := dnsmessage.ResourceHeader{Name: owner, Class: q.Class, TTL: r.ttl}
		switch {
		case a.Is4() && q.Type == dnsmessage.TypeA:
			err = errors.Join(err, b.AResource(h, dnsmessage.AResource{A: a.As4()}))
		case a.Is6() && q.Type == dnsmessage.TypeAAAA:
			err = errors.Join(err, b.AAAAResource(h, dnsmessage.AAAAResource{AAAA: a.As16()}))
		}
	}
	message, finishErr := b.Finish()
	if err != nil || finishErr != nil {
		return nil
	}
	return message
}

// Found is an answer.
type Found struct {
	RCode     dnsmessage.RCode
	Addresses []netip.Addr
	TTL       uint32
	Took      time.Duration
}

// Ask asks a server for the addresses of a name, of the family of the type, from inside the namespace at path. The network is udp or tcp.
func Ask(path, network string, server netip.AddrPort, name string, kind dnsmessage.Type, limit time.Duration) (Found, error) {
	begun := time.Now()
	var conn net.Conn
	err := netns.Do(path, func() (err error) {
		conn, err = net.DialTimeout(network, server.String(), limit)
		return err
	})
	if err != nil {
		return Found{}, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(begun.Add(limit)); err != nil {
		return Found{}, fmt.Errorf("ask for %s: %w", name, err)
	}
	id := uint16(rand.Uint32())
	query, err := question(id, name, kind)
	if err != nil {
		return Found{}, err
	}
	answer := make([]byte, 4096)
	if network == "tcp" {
		if err := writeTCP(conn, query); err != nil {
			return Found{}, fmt.Errorf("ask for %s: %w", name, err)
		}
		if answer, err = readTCP(conn); err != nil {
			return Found{}, fmt.Errorf("ask for %s: %w", name, err)
		}
	} else {
		if _, err := conn.Write(query); err != nil {
			return Found{}, fmt.Errorf("ask for %s: %w", name, err)
		}
		n, err := conn.Read(answer)
		if err != nil {
			return Found{}, fmt.Errorf("ask for %s: %w", name, err)
		}
		answer = answer[:n]
	}
	found, err := parse(answer, id)
	found.Took = time.Since(begun)
	return found, err
}

func question(id uint16, name string, kind dnsmessage.Type) ([]byte, error) {
	n, err := dnsmessage.NewName(strings.TrimSuffix(name, ".") + ".")
	if err != nil {
		return nil, fmt.Errorf("name %q: %w", name, err)
	}
	b := dnsmessage.NewBuilder(nil, dnsmessage.Header{ID: id, RecursionDesired: true})
	if err := errors.Join(b.StartQuestions(), b.Question(dnsmessage.Question{Name: n, Type: kind, Class: dnsmessage.ClassINET})); err != nil {
		return nil, fmt.Errorf("name %q: %w", name, err)
	}
	return b.Finish()
}

func parse(answer []byte, id uint16) (Found, error) {
	var m dnsmessage.Message
	if err := m.Unpack(answer); err != nil {
		return Found{}, fmt.Errorf("read answer: %w", err)
	}
	if m.ID != id || !m.Response {
		return Found{}, fmt.Errorf("answer %d to query %d", m.ID, id)
	}
	f := Found{RCode: m.RCode}
	for _, r := range m.Answers {
		f.TTL = r.Header.TTL
		switch body := r.Body.(type) {
		case *dnsmessage.AResource:
			f.Addresses = append(f.Addresses, netip.AddrFrom4(body.A))
		case *dnsmessage.AAAAResource:
			f.Addresses = append(f.Addresses, netip.AddrFrom16(body.AAAA))
		}
	}
	return f, nil
}
