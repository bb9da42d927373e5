//go:build cgo

package pkcs11

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/miekg/pkcs11"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/signer"
)

// Describe implements signer.Backend. While the connection is being made again it says so and does not wait.
func (b *Backend) Describe(ctx context.Context) signer.Description {
	d := signer.Description{Kind: "pkcs11", Device: b.device(), Limits: map[string]string{}}
	if serial := b.wanted(); serial != nil {
		d.Limits["serial"] = printable(*serial)
	}
	d.Limits["sessions"] = strconv.Itoa(b.Parallel())
	d.Limits["hanging_calls"] = strconv.Itoa(int(b.hung.Load()))
	if b.link.Load() == nil && b.connecting.Load() && b.serial.Load() != nil && b.refused.Load() == nil {
		d.State, d.Problem = signer.Recovering, "connecting to the token again"
		d.Remedy = "none is needed unless it lasts; then check the device"
		return d
	}
	info, err := do(ctx, b, func(s *slot) (pkcs11.TokenInfo, error) {
		info, err := s.link.mod.GetTokenInfo(s.link.slot)
		if err != nil {
			return info, failed("C_GetTokenInfo", err)
		}
		return info, s.link.same(info)
	})
	if l := b.link.Load(); l != nil {
		d.Grade = l.grade()
		d.Algorithms = l.algorithms
		d.Mechanisms = mechanismNames(l.mechanisms)
		d.Device = printable(l.info.Label) + " (" + printable(l.info.ManufacturerID) + " " + printable(l.info.Model) +
			", serial " + printable(l.info.SerialNumber) + ")"
		d.Limits["serial"] = printable(l.info.SerialNumber)
	}
	if err != nil {
		d.State, d.Problem, d.Remedy = diagnose(err)
		if b.refused.Load() != nil {
			d.Limits["pin"] = "refused"
		}
		return d
	}
	d.State = signer.Ready
	d.Limits["token_sessions_max"] = sessionLimit(info.MaxRwSessionCount)
	d.Limits["pin"] = pinState(info.Flags)
	return d
}

func (b *Backend) device() string {
	if serial := b.wanted(); serial != nil {
		return b.cfg.TokenLabel + " (serial " + printable(*serial) + ")"
	}
	return b.cfg.TokenLabel
}

// diagnose says what an error of the device means for its state, and what to do.
func diagnose(err error) (signer.State, string, string) {
	for _, d := range diagnoses {
		if errors.Is(err, d.cause) {
			return d.state, d.problem, d.remedy
		}
	}
	if other := (*otherToken)(nil); errors.As(err, &other) {
		return signer.Degraded, other.Error(), "put the token with the expected serial back; if the other one is meant to " +
			"replace it, restart the daemon, then run trustd backend reset-canary"
	}
	e := fault.From(err)
	state := signer.Degraded
	switch {
	case classOf(err) == signer.AuthorisationRefused:
		state = signer.Locked
	case e.Code == fault.AuthorisationRefused || e.Code == fault.InsecureSecret: // there is no PIN to show to the token
		state = signer.Stopped
	default:
		return state, cmp.Or(e.Text, e.Code.Title()), e.Code.Hint()
	}
	problem := e.Text
	if problem == "" {
		problem = e.Code.Title()
	}
	return state, problem, e.Code.Hint()
}

var diagnoses = []struct {
	cause           error
	state           signer.State
	problem, remedy string
}{
	{errNoModule, signer.Stopped, "the PKCS#11 module is not there",
		"install the vendor's module (Debian: apt install softhsm2) or correct the path in the backend's configuration"},
	{errNotAModule, signer.Stopped, "the PKCS#11 module cannot be loaded",
		"check that the file is a PKCS#11 module for this machine and that the libraries it needs are installed"},
	{errNoToken, signer.Degraded, "no token with that label and serial is present",
		"plug the token in, or correct label and serial; pkcs11-tool --module MODULE -L lists the tokens"},
	{errTwoTokens, signer.Stopped, "several tokens have that label and serial",
		"name the token's serial in the backend's configuration"},
	{errNoSerial, signer.Degraded, errNoSerial.Error(), "put the token that holds the keys back"},
	{errHangs, signer.Degraded, "a call into the module does not come back",
		"the plugin process is restarted by itself; if it hangs again, check the device"},
	{errPINLocked, signer.Locked, "the PIN is locked",
		"have the security officer reset the PIN, then run trustd backend unlock NAME"},
	{pkcs11.Error(pkcs11.CKR_PIN_LOCKED), signer.Locked, "the PIN is locked",
		"have the security officer reset the PIN, then run trustd backend unlock NAME"},
	{errLastTry, signer.Locked, "one try is left before the PIN locks, and it was not taken",
		"make sure that the configured PIN is right, then run trustd backend unlock NAME, which takes that try"},
}

// softwareMakers are the tokens that say of themselves that they are no hardware.
var softwareMakers = []string{
	"softhsm", "kryoptic", "opencryptoki soft", "ibm soft", "mozilla foundation", "gnome keyring",
}

func (l *link) grade() signer.Grade {
	says := strings.ToLower(l.info.ManufacturerID + " " + l.info.Model)
	for _, m := range softwareMakers {
		if strings.Contains(says, m) {
			return signer.Software
		}
	}
	return signer.HardwareClaimed
}

func pinState(flags uint) string {
	switch {
	case flags&pkcs11.CKF_USER_PIN_LOCKED != 0:
		return "locked"
	case flags&pkcs11.CKF_USER_PIN_FINAL_TRY != 0:
		return "final_try"
	case flags&pkcs11.CKF_USER_PIN_COUNT_LOW != 0:
		return "count_low"
	case flags&pkcs11.CKF_LOGIN_REQUIRED == 0:
		return "not_needed"
	}
	return "ok"
}

func sessionLimit(n uint) string {
	if n == 0 || n == ^uint(0) { // CK_EFFECTIVELY_INFINITE, CK_UNAVAILABLE_INFORMATION
		return "unlimited"
	}
	return strconv.FormatUint(uint64(n), 10)
}

// names of the mechanisms that matter for keys that sign; the others are listed by number.
var names = map[uint]string{
	pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN: "CKM_RSA_PKCS_KEY_PAIR_GEN",
	pkcs11.CKM_RSA_PKCS:              "CKM_RSA_PKCS",
	pkcs11.CKM_RSA_PKCS_PSS:          "CKM_RSA_PKCS_PSS",
	pkcs11.CKM_SHA256_RSA_PKCS:       "CKM_SHA256_RSA_PKCS",
	pkcs11.CKM_SHA256_RSA_PKCS_PSS:   "CKM_SHA256_RSA_PKCS_PSS",
	pkcs11.CKM_SHA384_RSA_PKCS_PSS:   "CKM_SHA384_RSA_PKCS_PSS",
	pkcs11.CKM_SHA512_RSA_PKCS_PSS:   "CKM_SHA512_RSA_PKCS_PSS",
	pkcs11.CKM_EC_KEY_PAIR_GEN:       "CKM_EC_KEY_PAIR_GEN",
	pkcs11.CKM_ECDSA:                 "CKM_ECDSA",
	pkcs11.CKM_ECDSA_SHA256:          "CKM_ECDSA_SHA256",
	pkcs11.CKM_ECDSA_SHA384:          "CKM_ECDSA_SHA384",
	pkcs11.CKM_ECDH1_DERIVE:          "CKM_ECDH1_DERIVE",
	pkcs11.CKM_AES_KEY_GEN:           "CKM_AES_KEY_GEN",
	pkcs11.CKM_AES_KEY_WRAP:          "CKM_AES_KEY_WRAP",
	pkcs11.CKM_AES_GCM:               "CKM_AES_GCM",
	pkcs11.CKM_SHA256:                "CKM_SHA256",
	pkcs11.CKM_SHA384:                "CKM_SHA384",
	pkcs11.CKM_SHA512:                "CKM_SHA512",
	ckmEdwardsKeyPairGen:             "CKM_EC_EDWARDS_KEY_PAIR_GEN",
	ckmEdDSA:                         "CKM_EDDSA",
}

func mechanismNames(m map[uint]pkcs11.MechanismInfo) []string {
	out := make([]string, 0, len(m))
	for mech := range m {
		if n, ok := names[mech]; ok {
			out = append(out, n)
		} else {
			out = append(out, fmt.Sprintf("0x%08X", mech))
		}
	}
	slices.SortFunc(out, func(a, b string) int { // named ones first
		if (a[0] == 'C') != (b[0] == 'C') {
			return strings.Compare(b[:1], a[:1])
		}
		return strings.Compare(a, b)
	})
	return out
}
