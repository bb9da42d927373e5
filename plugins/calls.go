package plugins

import (
	"context"
	"errors"
	"maps"
	"strconv"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/plugins/signerpb"
	"github.com/trustd/trustd/signer"
)

// A callKind says how long a call may take, whether it may be made twice, and whether it is made although the device
// refused the PIN.
type callKind struct {
	limit  time.Duration
	repeat bool
	always bool
}

var (
	quick  = callKind{repeat: true}
	slow   = callKind{limit: slowLimit, repeat: true}
	making = callKind{limit: slowLimit}
	asking = callKind{repeat: true, always: true}

	errHang = errors.New("a call to the device did not come back")
)

// remote runs one unary call in the child. When the child dies meanwhile and repeating is safe, it is repeated
// once in the next child.
func remote[T any](ctx context.Context, h *Host, c callKind,
	f func(context.Context, *conn) (T, *signerpb.Error, error)) (T, error) {
	var zero T
	if err := ctx.Err(); err != nil {
		return zero, fault.From(err)
	}
	if err := h.begin(); err != nil {
		return zero, err
	}
	defer h.end()
	get := h.child
	if c.always {
		get = h.anyChild
	}
	for try := 0; ; try++ {
		conn, err := get(ctx)
		if err != nil {
			return zero, err
		}
		limited, cancel := context.WithTimeoutCause(ctx, max(c.limit, h.cfg.Deadline), errHang)
		v, remoteErr, err := f(limited, conn)
		hung := errors.Is(context.Cause(limited), errHang)
		cancel()
		switch {
		case err == nil && remoteErr == nil:
			return v, nil
		case err == nil:
			return zero, h.noticed(decodeError(remoteErr))
		case ctx.Err() != nil:
			return zero, fault.From(ctx.Err())
		case hung:
			err = errHang
		}
		conn.suspect(err)
		// Also when the call is not repeated: the caller's next one must not meet the same child.
		waited := conn.gone(ctx)
		if hung || !c.repeat || try > 0 {
			return zero, fault.Wrap(fault.DeviceDead, err, "the plugin process died during the call")
		}
		if waited != nil {
			return zero, waited
		}
	}
}

// noticed remembers that the device refused the PIN: nothing reaches it any more.
func (h *Host) noticed(err error) error {
	if signer.ClassOf(err) == signer.AuthorisationRefused && fault.CodeOf(err) == fault.AuthorisationRefused {
		h.refuse(fault.From(err))
	}
	return err
}

func (h *Host) refuse(e *fault.Error) {
	if h.refused.CompareAndSwap(nil, e) {
		h.cfg.Log.Error("the device refused the authorisation; it is not tried again until it is unlocked", "err", e.Verbose())
	}
}

// Describe implements signer.Backend.
func (h *Host) Describe(ctx context.Context) signer.Description {
	d, err := remote(ctx, h, asking, func(ctx context.Context, c *conn) (signer.Description, *signerpb.Error, error) {
		if last := c.said.Load(); last != nil && h.refused.Load() != nil { // not even a probe reaches the device
			d := *last
			d.Limits = maps.Clone(d.Limits)
			d.Limits["plugin_pid"] = strconv.Itoa(c.pid)
			return d, nil, nil
		}
		r, err := c.rpc.Describe(ctx, &signerpb.DescribeRequest{})
		if err != nil {
			return signer.Description{}, nil, err
		}
		if r.GetError() != nil {
			return signer.Description{}, r.GetError(), nil
		}
		d := h.described(c, r)
		if d.State == signer.Ready && !c.proved.Load() && time.Since(c.since) < trial {
			d.State, d.Problem = signer.Recovering, "the plugin was started again; no signature has proved it yet"
			d.Remedy = "none is needed"
		}
		d.Limits["plugin_pid"] = strconv.Itoa(c.pid)
		return d, nil, nil
	})
	if err != nil {
		d = signer.Description{Device: h.cfg.Settings["token"], Limits: map[string]string{}}
		if d.Device == "" {
			d.Device = h.cfg.Name
		}
		d.State, d.Problem, d.Remedy = diagnose(err)
		if p := h.phase.Load(); p.conn == nil {
			d.State, d.Problem, d.Remedy = p.state, p.problem, p.remedy
		}
	}
	d.Kind = h.cfg.Kind
	if err == nil && d.State != signer.Locked && h.refused.Load() != nil {
		d.State, d.Problem, d.Remedy = signer.Locked, problemLocked, h.remedyLocked()
	}
	d.Limits["plugin_restarts"] = strconv.FormatInt(h.restarts.Load(), 10)
	return d
}

const problemLocked = "the device refused the authorisation, which is not tried again"

func (h *Host) remedyLocked() string {
	return "correct the PIN or secret of the backend, then run trustd backend unlock " + h.cfg.Name
}

// described takes in what the child says of itself.
func (h *Host) described(c *conn, r *signerpb.DescribeResponse) signer.Description {
	d := decodeDescription(r)
	said := d
	said.Limits = maps.Clone(d.Limits)
	c.said.Store(&said)
	c.stand(r.GetStanding())
	if serial := d.Limits[settingSerial]; serial != "" {
		h.serial.CompareAndSwap(nil, &serial)
	}
	switch {
	case d.State == signer.Ready:
		c.settled.Store(true)
		c.taken.Store(false)
	case r.GetStanding().GetPinTaken():
		c.taken.Store(true) // the message on the other socket may still be under way
	}
	switch {
	case d.State == signer.Locked || d.Limits[limitPIN] == pinRefused:
		h.refuse(fault.New(fault.AuthorisationRefused, "the device refused the authorisation"))
	}
	return d
}

// The entry of signer.Description.Limits by which a backend says that the device refused its PIN.
const (
	limitPIN   = "pin"
	pinRefused = "refused"
)

// Generate implements signer.Backend.
func (h *Host) Generate(ctx context.Context, id signer.ID, alg ident.Algorithm) (signer.Key, error) {
	return h.made(ctx, making, func(ctx context.Context, c *conn) (*signerpb.KeyResponse, error) {
		return c.rpc.Generate(ctx, &signerpb.GenerateRequest{Id: id.Bytes(), Algorithm: uint32(alg)})
	})
}

// Import implements signer.Importer.
func (h *Host) Import(ctx context.Context, id signer.ID, pkcs8 []byte) (signer.Key, error) {
	return h.made(ctx, making, func(ctx context.Context, c *conn) (*signerpb.KeyResponse, error) {
		return c.rpc.Import(ctx, &signerpb.ImportRequest{Id: id.Bytes(), Pkcs8: pkcs8})
	})
}

// Open implements signer.Backend.
func (h *Host) Open(ctx context.Context, id signer.ID, pub ident.PublicKey) (signer.Key, error) {
	if pub.IsZero() {
		return nil, fault.BadField("public_key", "a key is opened together with its public key")
	}
	return h.made(ctx, quick, func(ctx context.Context, c *conn) (*signerpb.KeyResponse, error) {
		return c.rpc.Open(ctx, &signerpb.OpenRequest{Id: id.Bytes(), Spki: pub.SPKI()})
	})
}

// made runs a call that leaves a key open in the child.
func (h *Host) made(ctx context.Context, kind callKind,
	f func(context.Context, *conn) (*signerpb.KeyResponse, error)) (signer.Key, error) {
	return remote(ctx, h, kind, func(ctx context.Context, c *conn) (signer.Key, *signerpb.Error, error) {
		r, err := f(ctx, c)
		if err != nil || r.GetError() != nil {
			return nil, r.GetError(), err
		}
		info := h.info(r.GetInfo())
		if info.Problem != "" || info.Public.IsZero() || r.GetRef() == 0 {
			return nil, encodeError(fault.New(fault.DeviceDead, "the plugin returned a key that cannot be used")), nil
		}
		k := &key{host: h, info: info}
		k.open.Store(&opened{c, r.GetRef()})
		return k, nil, nil
	})
}

// info reads what the child says of a key, and gives it its URI where that is the host's business. Nothing leaves
// through the boundary, whatever the plugin would give out.
func (h *Host) info(p *signerpb.KeyInfo) signer.KeyInfo {
	info := decodeInfo(p)
	info.Exported = false
	if h.cfg.Kind == KindPlugin {
		info.URI = signer.URI{Scheme: KindPlugin, ID: info.ID}.String()
	}
	return info
}

// Find implements signer.Backend.
func (h *Host) Find(ctx context.Context, id signer.ID) (signer.KeyInfo, error) {
	return remote(ctx, h, quick, func(ctx context.Context, c *conn) (signer.KeyInfo, *signerpb.Error, error) {
		r, err := c.rpc.Find(ctx, &signerpb.FindRequest{Id: id.Bytes()})
		return h.info(r.GetInfo()), r.GetError(), err
	})
}

// Keys implements signer.Backend.
func (h *Host) Keys(ctx context.Context) ([]signer.KeyInfo, error) {
	return remote(ctx, h, slow, func(ctx context.Context, c *conn) ([]signer.KeyInfo, *signerpb.Error, error) {
		r, err := c.rpc.Keys(ctx, &signerpb.KeysRequest{})
		var out []signer.KeyInfo
		for _, k := range r.GetKeys() {
			out = append(out, h.info(k))
		}
		return out, r.GetError(), err
	})
}

// Destroy implements signer.Backend.
func (h *Host) Destroy(ctx context.Context, id signer.ID) error {
	_, err := remote(ctx, h, quick, func(ctx context.Context, c *conn) (struct{}, *signerpb.Error, error) {
		r, err := c.rpc.Destroy(ctx, &signerpb.DestroyRequest{Id: id.Bytes()})
		return struct{}{}, r.GetError(), err
	})
	return err
}
