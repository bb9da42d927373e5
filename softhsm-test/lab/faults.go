package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/softhsm-test/tpmproxy"
)

// A Fault is one thing that goes wrong with one backend. Those that this package lists need a lab with a Proxy and with
// a Faulty over PKCS#11.
type Fault struct {
	Name    string
	Backend string
	// Begin makes the fault, End heals it; it is nil where the fault passes by itself.
	Begin, End func(context.Context, *Lab) error
	// Unseen says that no request needs to fail: the fault is repaired within the requests that meet it.
	Unseen bool
	// Class is what the daemon counts it as; "" where that depends.
	Class signer.Class
	Long  bool // takes its time
}

// proxy returns a Begin that puts rules in force on the TPM's proxy.
func proxy(rules ...tpmproxy.Rule) func(context.Context, *Lab) error {
	return func(_ context.Context, l *Lab) error {
		l.Proxy.Script(rules...)
		return nil
	}
}

func signalChild(backend string, s syscall.Signal) func(context.Context, *Lab) error {
	return func(_ context.Context, l *Lab) error {
		pid := l.Child(backend)
		if pid == 0 {
			return errors.New("the plugin does not run")
		}
		return syscall.Kill(pid, s)
	}
}

// unplug takes the token's folder away and puts in its place what then makes there; the end is the token's return.
func unplug(backend string, then func(context.Context, *Lab) error) (begin, end func(context.Context, *Lab) error) {
	var restore func() error
	begin = func(ctx context.Context, l *Lab) (err error) {
		if restore, err = l.Unplug(backend); err != nil || then == nil {
			return err
		}
		return then(ctx, l)
	}
	return begin, func(context.Context, *Lab) error { return restore() }
}

// ScriptFaults are faults by script on a Faulty of that name.
func ScriptFaults(backend string) []Fault {
	script := func(lines ...string) func(context.Context, *Lab) error {
		return func(_ context.Context, l *Lab) error { return l.Script(backend, lines...) }
	}
	out := []Fault{
		{Name: "a slow device", Begin: script(`{"at":"C_Sign","do":"delay","p50_ms":20,"p95_ms":60}`), Unseen: true},
		{
			Name: "sessions are lost", Class: signer.SessionLost, Unseen: true,
			Begin: script(`{"at":"C_SignInit","every":7,"do":"drop"}`),
		},
		{
			Name: "the login is lost once", Class: signer.LoginLost, Unseen: true,
			Begin: script(`{"at":"C_SignInit","nth":5,"do":"return","code":"CKR_USER_NOT_LOGGED_IN"}`),
		},
		{
			Name: "a busy token", Class: signer.TransientBusy, Unseen: true,
			Begin: script(`{"at":"C_Sign","every":3,"do":"return","code":"CKR_FUNCTION_CANCELED"}`),
		},
		{Name: "signatures are corrupted", Class: signer.ModuleDead, Begin: script(`{"at":"C_Sign","do":"corrupt"}`)},
		{
			Name: "some signatures are corrupted", Unseen: true,
			Begin: script(`{"at":"C_Sign","p":0.5,"seed":1,"do":"corrupt"}`),
		},
		{
			Name: "the plugin corrupts signatures", Class: signer.ModuleDead, Unseen: true,
			Begin: script(`{"at":"Sign","every":2,"do":"corrupt"}`),
		},
		{
			Name: "the device fails", Class: signer.TokenLost,
			Begin: script(`{"at":"C_SignInit","do":"return","code":"CKR_DEVICE_ERROR"}`),
		},
		{Name: "the module hangs", Long: true, Class: signer.ModuleDead, Begin: script(`{"at":"C_Sign","do":"hang"}`)},
		{
			Name: "the module exits", Class: signer.ModuleDead, Unseen: true,
			Begin: script(`{"at":"C_Sign","nth":20,"do":"exit","status":7}`),
		},
		{
			Name: "the module crashes", Class: signer.ModuleDead, Unseen: true,
			Begin: script(`{"at":"C_Sign","nth":20,"do":"crash"}`),
		},
		{
			Name: "the module crashes again and again", Long: true, Class: signer.ModuleDead,
			Begin: script(`{"at":"C_Sign","do":"crash"}`),
		},
		{Name: "the token is gone", Class: signer.TokenLost, Begin: script(`{"token":"gone"}`)},
		{Name: "the token looks empty", Class: signer.KeyGone, Begin: script(`{"token":"empty"}`)},
		{
			Name: "another token of the same label", Class: signer.TokenLost,
			Begin: script(`{"token":"other"}`),
		},
	}
	// One return value of each class that asks for another repair; signer/pkcs11 tests the whole table.
	for _, code := range []string{
		"CKR_SESSION_HANDLE_INVALID", "CKR_OBJECT_HANDLE_INVALID", "CKR_USER_NOT_LOGGED_IN", "CKR_DEVICE_REMOVED",
		"CKR_TOKEN_NOT_PRESENT", "CKR_GENERAL_ERROR", "CKR_CRYPTOKI_NOT_INITIALIZED", "CKR_HOST_MEMORY", "CKR_DEVICE_MEMORY",
		"CKR_SESSION_COUNT", "CKR_FUNCTION_FAILED", "0x80000001",
	} {
		for _, at := range []string{"C_SignInit", "C_Sign"} {
			out = append(out, Fault{
				Name: code + " at " + at, Long: true, Unseen: true,
				Begin: script(fmt.Sprintf(`{"at":%q,"p":0.5,"seed":3,"do":"return","code":%q}`, at, code)),
			})
		}
	}
	for i := range out {
		out[i].Backend = backend
		if out[i].End == nil {
			out[i].End = script()
		}
	}
	return out
}

// TokenFaults are real faults of the SoftHSM token HSM and of the plugin in which its module runs.
func TokenFaults() []Fault {
	var out []Fault
	for name, then := range map[string]func(context.Context, *Lab) error{
		"the token's folder is away": nil,
		"an empty folder in its place": func(_ context.Context, l *Lab) error {
			return os.Mkdir(l.TokenDir(HSM), 0o700)
		},
		"another token in its place": func(ctx context.Context, l *Lab) error { return l.NewToken(ctx, HSM) },
	} {
		s := Fault{Name: name, Backend: HSM}
		s.Begin, s.End = unplug(HSM, then)
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b Fault) int { return strings.Compare(a.Name, b.Name) })
	return append(out,
		Fault{Name: "the plugin is killed", Backend: HSM, Begin: signalChild(HSM, syscall.SIGKILL), Unseen: true},
		Fault{Name: "the plugin is stopped", Backend: HSM, Begin: signalChild(HSM, syscall.SIGSTOP), Unseen: true},
	)
}

func killTPM(_ context.Context, l *Lab) error    { l.KillTPM(); return nil }
func restartTPM(_ context.Context, l *Lab) error { return l.RestartTPM() }

// tools returns a step that runs tpm2-tools beside the daemon, one command after the other.
func tools(commands ...string) func(context.Context, *Lab) error {
	return func(ctx context.Context, l *Lab) error {
		for _, c := range commands {
			args := strings.Fields(c)
			if err := l.TPMTool(ctx, args[0], args[1:]...); err != nil {
				return err
			}
		}
		return nil
	}
}

// fillSlots takes all slots of the TPM for objects of somebody else.
func fillSlots(ctx context.Context, l *Lab) error {
	wait := tpmproxy.Return(0x922) // TPM_RC_RETRY: the daemon loads nothing meanwhile
	l.Proxy.Script(tpmproxy.Rule{Command: tpmproxy.Load, Do: wait}, tpmproxy.Rule{Command: tpmproxy.ContextLoad, Do: wait})
	defer l.Proxy.Script()
	if err := freeSlots(ctx, l); err != nil {
		return err
	}
	err := tools("tpm2_createprimary -Q -C n -c a.ctx", "tpm2_createprimary -Q -C n -c b.ctx")(ctx, l)
	if err != nil {
		return err
	}
	_ = tools("tpm2_createprimary -Q -C n -c c.ctx")(ctx, l) // the third may be the daemon's, for its storage root key
	return nil
}

// freeSlots flushes all transient objects of the TPM. The tool fails when the daemon flushes one of them before it does.
func freeSlots(ctx context.Context, l *Lab) (err error) {
	for range 20 {
		if err = tools("tpm2_flushcontext -t")(ctx, l); err == nil {
			return nil
		}
	}
	return err
}

// lockOut has the TPM refuse all that counts towards its dictionary-attack lockout.
func lockOut(ctx context.Context, l *Lab) error {
	const read = "tpm2_nvread -C 0x1500001 0x1500001 -P "
	if err := os.WriteFile(filepath.Join(l.Dir, "eight"), []byte("12345678"), 0o600); err != nil {
		return err
	}
	err := tools("tpm2_nvdefine -C o -s 8 -a ownerwrite|authread|authwrite -p right 0x1500001",
		"tpm2_nvwrite -C o -i eight 0x1500001", "tpm2_dictionarylockout -s -n 1 -t 600 -l 600")(ctx, l)
	if err != nil {
		return err
	}
	if err := tools(read+"wrong")(ctx, l); err == nil {
		return errors.New("the TPM takes a wrong password")
	}
	if err := tools(read+"right")(ctx, l); err == nil {
		return errors.New("the TPM is not locked out")
	}
	return nil
}

// TPMFaults are faults of the TPM and on the way to it.
func TPMFaults() []Fault {
	onSign := func(a tpmproxy.Action) []tpmproxy.Rule { return []tpmproxy.Rule{{Command: tpmproxy.Sign, Do: a}} }
	out := []Fault{
		{Name: "swtpm is killed", Class: signer.TokenLost, Begin: killTPM, End: restartTPM},
		{
			Name: "swtpm is shut down", Begin: func(ctx context.Context, l *Lab) error { return l.StopTPM(ctx) },
			End: restartTPM,
		},
		{
			Name: "swtpm hangs", Long: true,
			Begin: func(_ context.Context, l *Lab) error { return l.TPM().Signal(syscall.SIGSTOP) },
			End:   func(_ context.Context, l *Lab) error { return l.TPM().Signal(syscall.SIGCONT) },
		},
		{Name: "the TPM's slots are full", Begin: fillSlots, End: freeSlots, Unseen: true},
		// Keys are made so that a lockout does not reach them.
		{
			Name: "the TPM locks out", Unseen: true, Begin: lockOut,
			End: tools("tpm2_dictionarylockout -c", "tpm2_nvundefine 0x1500001"),
		},
		{
			Name: "TPM_RC_RETRY", Long: true, Class: signer.TransientBusy, Unseen: true,
			Begin: proxy(tpmproxy.Rule{Command: tpmproxy.Sign, Times: 20, Do: tpmproxy.Return(0x922)}),
		},
		{Name: "TPM_RC_FAILURE", Class: signer.ModuleDead, Begin: proxy(onSign(tpmproxy.Return(0x101))...)},
		{Name: "the TPM corrupts signatures", Begin: proxy(onSign(tpmproxy.CorruptSignature())...)},
		{Name: "the line to the TPM breaks", Class: signer.TokenLost, Begin: proxy(onSign(tpmproxy.Drop())...)},
		{
			Name: "the TPM answers no signature", Long: true, Class: signer.TokenLost,
			Begin: proxy(onSign(tpmproxy.Hang())...),
		},
	}
	for i := range out {
		out[i].Backend = TPM
		if out[i].End == nil {
			out[i].End = proxy()
		}
	}
	return out
}
