package plugins

import (
	"context"
	"sync/atomic"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/plugins/signerpb"
	"github.com/trustd/trustd/signature"
	"github.com/trustd/trustd/signer"
)

// A key is a key in the child. Its ref lives as long as the child and is made anew in the next one.
type key struct {
	host *Host
	info signer.KeyInfo
	open atomic.Pointer[opened]
}

type opened struct {
	in  *conn
	ref uint32
}

var _ signer.BatchSigner = (*key)(nil)

func (k *key) Public() ident.PublicKey { return k.info.Public }

func (k *key) Info() signer.KeyInfo { return k.info }

// Sign implements signer.Signer.
func (k *key) Sign(ctx context.Context, msg []byte) ([]byte, error) {
	out := []signer.Result{{}}
	k.sign(ctx, [][]byte{msg}, out)
	return out[0].Signature, out[0].Err
}

// SignBatch implements signer.BatchSigner.
func (k *key) SignBatch(ctx context.Context, msgs [][]byte) []signer.Result {
	out := make([]signer.Result, len(msgs))
	if len(msgs) > 0 {
		k.sign(ctx, msgs, out)
	}
	return out
}

// sign fills out. What was in flight when the child died is signed in the next one, once: a second signature of
// the same message does no harm.
func (k *key) sign(ctx context.Context, msgs [][]byte, out []signer.Result) {
	err := ctx.Err()
	if err == nil {
		if err = k.host.begin(); err == nil {
			defer k.host.end()
		}
	}
	if err != nil {
		failAll(out, fault.From(err))
		return
	}
	c, ref, err := k.ref(ctx)
	if err != nil {
		failAll(out, err)
		return
	}
	lost := c.sign(ctx, ref, msgs, out)
	if len(lost) > 0 && c.gone(ctx) == nil {
		retry(ctx, k, msgs, out, lost)
	}
	if wrong := k.check(msgs, out, nil); len(wrong) > 0 {
		retry(ctx, k, msgs, out, wrong)
		k.check(msgs, out, wrong)
	}
}

// check takes out signatures that do not verify, and returns their places. again are the only places to look at; nil
// stands for all.
func (k *key) check(msgs [][]byte, out []signer.Result, again []int) (wrong []int) {
	if k.host.cfg.Verified {
		return nil
	}
	if again == nil {
		again = all(len(msgs))
	}
	for _, i := range again {
		if out[i].Err != nil {
			continue
		}
		if err := signature.Verify(k.info.Public, msgs[i], out[i].Signature); err != nil {
			k.host.failures.add(signer.ModuleDead)
			k.host.cfg.Log.Error("the plugin returned a signature that does not verify", "key", k.info.ID.String())
			out[i] = signer.Result{Err: fault.Wrap(fault.DeviceDead, &remoteError{signer.ModuleDead, err.Error()},
				"the plugin returned a signature that does not verify")}
			wrong = append(wrong, i)
		}
	}
	return wrong
}

// retry signs the messages named by lost once more and puts the results in their places.
func retry(ctx context.Context, k *key, msgs [][]byte, out []signer.Result, lost []int) {
	again := make([][]byte, len(lost))
	results := make([]signer.Result, len(lost))
	for i, n := range lost {
		again[i] = msgs[n]
	}
	c, ref, err := k.ref(ctx)
	if err != nil {
		failAll(results, err)
	} else {
		c.sign(ctx, ref, again, results)
	}
	for i, n := range lost {
		out[n] = results[i]
	}
}

// ref returns the child and what it calls this key, opening the key where a new child does not know it yet.
func (k *key) ref(ctx context.Context) (*conn, uint32, error) {
	c, err := k.host.child(ctx)
	if err != nil {
		return nil, 0, err
	}
	if o := k.open.Load(); o != nil && o.in == c {
		return c, o.ref, nil
	}
	o, err := remote(ctx, k.host, quick, func(ctx context.Context, c *conn) (*opened, *signerpb.Error, error) {
		r, err := c.rpc.Open(ctx, &signerpb.OpenRequest{Id: k.info.ID.Bytes(), Spki: k.info.Public.SPKI()})
		return &opened{c, r.GetRef()}, r.GetError(), err
	})
	if err != nil {
		return nil, 0, err
	}
	k.open.Store(o)
	return o.in, o.ref, nil
}

func failAll(out []signer.Result, err error) {
	for i := range out {
		out[i] = signer.Result{Err: err}
	}
}
