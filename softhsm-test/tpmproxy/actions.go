package tpmproxy

import (
	"encoding/binary"
	"math"
	"math/rand/v2"
	"sync"
	"time"
)

// Pass lets the command through.
func Pass() Action { return func(c *Call) []byte { return c.Forward() } }

// Return answers with a response code alone, any TPM_RC_*. The TPM does not see the command.
func Return(rc uint32) Action {
	return func(*Call) []byte {
		return binary.BigEndian.AppendUint32([]byte{0x80, 0x01, 0, 0, 0, headerSize}, rc)
	}
}

// Answer answers with these bytes. The TPM does not see the command.
func Answer(rsp []byte) Action { return func(*Call) []byte { return rsp } }

// Drop hangs up before the TPM has seen the command.
func Drop() Action { return func(*Call) []byte { return nil } }

// DropAfter hangs up once the TPM has done the command: what it answers is lost.
func DropAfter() Action {
	return func(c *Call) []byte {
		c.Forward()
		return nil
	}
}

// Hang answers nothing until the caller hangs up.
func Hang() Action {
	return func(c *Call) []byte {
		<-c.Gone
		return nil
	}
}

// Delay waits, each time as long as d draws, then lets the command through.
func Delay(d Distribution) Action {
	return func(c *Call) []byte {
		t := time.NewTimer(d.Draw())
		defer t.Stop()
		select {
		case <-t.C:
			return c.Forward()
		case <-c.Gone:
			return nil
		}
	}
}

// Change lets the command through, and f change a response of success. f may change it in place, or return other
// bytes; the size in the header is set to fit.
func Change(f func(rsp []byte) []byte) Action {
	return func(c *Call) []byte {
		rsp := c.Forward()
		if len(rsp) < headerSize || binary.BigEndian.Uint32(rsp[6:]) != 0 {
			return rsp
		}
		if rsp = f(rsp); len(rsp) >= headerSize {
			binary.BigEndian.PutUint32(rsp[2:], uint32(len(rsp)))
		}
		return rsp
	}
}

// CorruptSignature changes one bit of the signature in a response to Sign. The HMAC of the caller's session, if it has
// one, does not fit any more.
func CorruptSignature() Action {
	// Header and size of the parameters, then algorithm, hash and the size of r or of an RSA signature.
	const at = headerSize + 4 + 2 + 2 + 2 + 8
	return Change(func(rsp []byte) []byte {
		if len(rsp) > at {
			rsp[at] ^= 1
		}
		return rsp
	})
}

// CorruptHMAC changes one bit of the HMAC with which a session proves a response: it ends the response.
func CorruptHMAC() Action {
	return Change(func(rsp []byte) []byte {
		rsp[len(rsp)-1] ^= 1
		return rsp
	})
}

// Truncate cuts responses to n bytes, under a header that says so.
func Truncate(n int) Action {
	return Change(func(rsp []byte) []byte { return rsp[:max(min(n, len(rsp)), headerSize)] })
}

// A Distribution draws durations. It is safe for concurrent use.
type Distribution interface{ Draw() time.Duration }

// A Constant is the same each time.
type Constant time.Duration

// Draw returns it.
func (c Constant) Draw() time.Duration { return time.Duration(c) }

// z95 is the 95 % quantile of the standard normal distribution.
const z95 = 1.6448536269514722

type logNormal struct {
	mu, sigma float64
	lock      sync.Mutex
	rnd       *rand.Rand
}

// LogNormal returns the distribution with this median and this 95 % quantile, as answers over a network have. The same
// seed draws the same.
func LogNormal(p50, p95 time.Duration, seed uint64) Distribution {
	mu := math.Log(float64(max(p50, 1)))
	sigma := (math.Log(float64(max(p95, p50, 1))) - mu) / z95
	return &logNormal{mu: mu, sigma: sigma, rnd: rand.New(rand.NewPCG(seed, 0))}
}

// Draw returns a duration, at most an hour.
func (l *logNormal) Draw() time.Duration {
	l.lock.Lock()
	x := l.rnd.NormFloat64()
	l.lock.Unlock()
	return time.Duration(min(math.Exp(l.mu+l.sigma*x), float64(time.Hour)))
}
