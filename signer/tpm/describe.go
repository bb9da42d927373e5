package tpm

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/google/go-tpm/tpm2"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/internal/tpmdev"
	"github.com/trustd/trustd/signer"
)

// facts is what a TPM says of itself and what it can do. It is immutable.
type facts struct {
	maker, vendor, firmware, revision string
	slots                             int // transient objects at once
	algorithms                        []ident.Algorithm
	emulated                          bool
	props                             map[tpm2.TPMPT]uint32
}

const (
	fewestSlots  = 2  // a key and the storage key above it
	leastSlots   = 3  // PC Client TPM Profile, and what the kernel's resource manager grants a connection
	mostSlots    = 16 // more would only be more to lose
	propsAsked   = 127
	firstFixed   = 0x100
	firstDynamic = 0x200
)

// readFacts asks the TPM for its properties and probes which algorithms it takes.
func readFacts(conn *tpmdev.Conn) (*facts, error) {
	props, err := properties(conn, firstFixed)
	if err != nil {
		return nil, err
	}
	f := &facts{
		maker: text(props[tpm2.TPMPTManufacturer]),
		vendor: text(props[tpm2.TPMPTVendorString1], props[tpm2.TPMPTVendorString2],
			props[tpm2.TPMPTVendorString3], props[tpm2.TPMPTVendorString4]),
		firmware: fmt.Sprintf("%d.%d", props[tpm2.TPMPTFirmwareVersion1]>>16, props[tpm2.TPMPTFirmwareVersion1]&0xffff),
		revision: fmt.Sprintf("%d.%02d", props[tpm2.TPMPTRevision]/100, props[tpm2.TPMPTRevision]%100),
		slots:    min(max(int(props[tpm2.TPMPTHRTransientMin]), leastSlots), mostSlots),
		props:    props,
	}
	if conn.Managed() {
		f.slots = leastSlots
	}
	f.emulated = emulator(f.maker, f.vendor)
	for _, alg := range preferred {
		_, err := command(tpm2.TestParms{Parameters: kinds[alg].parms()}.Execute(conn))
		if err == nil {
			f.algorithms = append(f.algorithms, alg)
		} else if classify(err) != signer.CallerError {
			return nil, fmt.Errorf("probing an algorithm: %w", err)
		}
	}
	return f, nil
}

// properties reads one group of the TPM's properties.
func properties(conn *tpmdev.Conn, first uint32) (map[tpm2.TPMPT]uint32, error) {
	rsp, err := command(tpm2.GetCapability{
		Capability: tpm2.TPMCapTPMProperties, Property: first, PropertyCount: propsAsked,
	}.Execute(conn))
	if err != nil {
		return nil, fmt.Errorf("reading properties: %w", err)
	}
	list, err := rsp.CapabilityData.Data.TPMProperties()
	if err != nil {
		return nil, errors.Join(errProof, err)
	}
	props := make(map[tpm2.TPMPT]uint32, len(list.TPMProperty))
	for _, p := range list.TPMProperty {
		props[p.Property] = p.Value
	}
	return props, nil
}

// text reads characters packed in properties, leaving out what would not print.
func text(words ...uint32) string {
	var raw []byte
	for _, w := range words {
		raw = binary.BigEndian.AppendUint32(raw, w)
	}
	return strings.TrimSpace(strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return -1
		}
		return r
	}, string(raw)))
}

// emulator recognises the TPM emulators by what they call themselves: libtpms, behind swtpm and the TPMs of
// virtual machines, and the reference implementation's simulator.
func emulator(maker, vendor string) bool {
	return maker == "IBM" && strings.HasPrefix(vendor, "SW") || vendor == "xCG fTPM"
}

func (f *facts) grade(a tpmdev.Address) signer.Grade {
	if f.emulated || a.Socket { // only emulators live on sockets
		return signer.Software
	}
	return signer.HardwareClaimed
}

func (f *facts) device(a tpmdev.Address) string {
	s := fmt.Sprintf("TPM 2.0 by %s (%s), firmware %s", f.maker, f.vendor, f.firmware)
	if f.grade(a) == signer.Software {
		s += ", an emulator in software"
	}
	return s
}

// offers reports whether the TPM can make and use keys of an algorithm.
func (f *facts) offers(alg ident.Algorithm) bool {
	for _, a := range f.algorithms {
		if a == alg {
			return true
		}
	}
	return false
}

func (f *facts) limits() map[string]string {
	dec := func(p tpm2.TPMPT) string { return strconv.FormatUint(uint64(f.props[p]), 10) }
	return map[string]string{
		"loaded_objects":   strconv.Itoa(f.slots),
		"persistent_min":   dec(tpm2.TPMPTHRPersistentMin),
		"sessions_loaded":  dec(tpm2.TPMPTHRLoadedMin),
		"sessions_active":  dec(tpm2.TPMPTActiveSessionsMax),
		"command_bytes":    dec(tpm2.TPMPTMaxCommandSize),
		"library_revision": f.revision,
	}
}

// Describe asks the TPM what it is.
func (b *Backend) Describe(ctx context.Context) signer.Description {
	addr := b.dev.Address()
	d := signer.Description{Kind: "tpm", Device: addr.String(), Grade: signer.HardwareClaimed, State: signer.Ready}
	if addr.Socket {
		d.Grade = signer.Software
	}
	var f *facts
	var now map[tpm2.TPMPT]uint32
	err := b.do(ctx, func(ch *chip) error {
		props, err := properties(ch.conn, firstDynamic)
		if err == nil {
			_, err = ch.parent(nil)
		}
		f, now = ch.facts, props
		return err
	})
	if err != nil {
		d.State, d.Problem, d.Remedy = ailment(err, addr)
		return d
	}
	d.Device, d.Grade, d.Algorithms, d.Limits = f.device(addr), f.grade(addr), b.offered(f), f.limits()
	d.Limits["lockout_counter"] = strconv.FormatUint(uint64(now[tpm2.TPMPTLockoutCounter]), 10)
	d.Limits["persistent_free"] = strconv.FormatUint(uint64(now[tpm2.TPMPTHRPersistentAvail]), 10)
	for _, a := range d.Algorithms {
		d.Mechanisms = append(d.Mechanisms, mechanisms[a])
	}
	b.mu.Lock()
	if n := len(b.locked); n > 0 {
		d.Limits["keys_refused"] = strconv.Itoa(n)
	}
	b.mu.Unlock()
	if b.notes.recovering() {
		d.State, d.Problem = signer.Recovering, "the TPM is back; no signature has proved it yet"
		d.Remedy = "Sign with a key of this TPM."
	}
	if b.badPSS.Load() {
		d.Limits["rsa"] = "not offered: this chip's PSS salt is not as long as the hash"
	}
	return d
}

var mechanisms = map[ident.Algorithm]string{
	ident.ECDSAP256: "TPM_ALG_ECDSA/TPM_ECC_NIST_P256/TPM_ALG_SHA256",
	ident.ECDSAP384: "TPM_ALG_ECDSA/TPM_ECC_NIST_P384/TPM_ALG_SHA384",
	ident.RSA2048:   "TPM_ALG_RSAPSS/2048/TPM_ALG_SHA256",
	ident.RSA3072:   "TPM_ALG_RSAPSS/3072/TPM_ALG_SHA256",
	ident.RSA4096:   "TPM_ALG_RSAPSS/4096/TPM_ALG_SHA256",
}

// ailment says what keeps a TPM from working, and what to do about it.
func ailment(err error, addr tpmdev.Address) (s signer.State, problem, remedy string) {
	e := fault.From(err)
	problem = e.Text
	if problem == "" {
		problem = e.Code.Title()
	}
	switch {
	case e.Code == fault.Stopping:
		return signer.Stopped, problem, "Open the backend again."
	case e.Code == fault.AuthorisationRefused:
		return signer.Locked, problem, "The owner hierarchy or its storage root key has a password: make a storage " +
			"root key without one persistent at 0x81000001, by the TCG's ECC template, or clear the owner's password; " +
			"then run trustd backend unlock NAME."
	case e.Code == fault.DeviceDead:
		return signer.Degraded, problem, "Power-cycle the host; a firmware update may be needed."
	case errors.Is(err, os.ErrPermission):
		return signer.Degraded, problem, "Give the daemon's user access to " + addr.Path + " (group tss)."
	case errors.Is(err, os.ErrNotExist) && !addr.Socket:
		return signer.Degraded, problem, "Enable the TPM in the firmware and load its kernel driver, so that " +
			addr.Path + " appears."
	case e.Code == fault.DeviceLost && addr.Socket:
		return signer.Degraded, problem, "Start swtpm on " + addr.Path + ", and see that no other program is connected to it."
	}
	return signer.Degraded, problem, e.Code.Hint()
}
