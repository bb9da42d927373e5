// Command demo shows the main job on one machine: an agent's key in an HSM and another's in a TPM, packets signed over
// the Unix socket by two Unix users, verified on the other side, and every refusal with its reason; one signature over
// many packets; and devices that go away and come back. It exits 0 only if every line is as it should be, and leaves nothing behind. With -run it leaves a daemon in the foreground instead.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"text/tabwriter"

	"github.com/trustd/trustd/softhsm-test/lab"
)

// The two users of the demonstration need no entry in the user database.
const (
	plannerUID    = 64101
	researcherUID = 64102
)

func main() {
	bin := flag.String("bin", "bin", "folder that holds trustd and trustd-pkcs11")
	stay := flag.Bool("run", false, "leave a daemon in the foreground to play with")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, *bin, *stay)
	stop()
	os.Exit(code)
}

func run(ctx context.Context, bin string, stay bool) (code int) {
	if os.Getuid() != 0 {
		fmt.Fprintln(os.Stderr, "the demonstration acts as two Unix users, so it must start as root: sudo make demo")
		return 1
	}
	o := lab.Options{Bin: bin}
	fmt.Println("Setting up a private SoftHSM token, a private swtpm and a daemon ...")
	l, err := lab.New(ctx, o)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() {
		if err := l.Close(); err != nil {
			fmt.Fprintln(os.Stderr, "cleaning up:", err)
			code = 1
		}
	}()
	if stay {
		o.Stderr = os.Stderr
	}
	if err := l.Start(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if stay {
		return play(ctx, l)
	}
	d := &demo{Lab: l, ctx: ctx, ok: true}
	d.show()
	if !d.ok {
		fmt.Fprintln(os.Stderr, "\nSomething is not as it should be. The end of the daemon's log:\n"+l.Log())
		return 1
	}
	return 0
}

// play prints what to try and waits for the end.
func play(ctx context.Context, l *lab.Lab) int {
	fmt.Printf(`
A daemon is running on a SoftHSM token and a swtpm. In another terminal, as root:

  export TRUSTD_CONFIG=%s PATH=%s:$PATH
  trustd key probe                             # what the two backends can do
  trustd agent add planner --uid 0             # a key in the HSM; root may use it
  trustd agent add researcher --backend tpm --uid 0
  trustd agent list
  echo '{"task_id":"t1","to_agent":"agent:researcher","intent":"read the news","permissions":{"allowed_actions":["read"]}}' \
    | sed "s|agent:researcher|$(trustd agent show researcher -o json | grep -o 'agent:[A-Za-z0-9+/]*' | head -1)|" \
    | trustd sign --agent planner > packet.json
  trustd verify packet.json                    # ACCEPT
  trustd verify packet.json                    # REJECT: replay_detected
  trustd whoami --explain; trustd doctor

Ctrl-C stops the daemon and removes %s.
`, l.Config, l.Dir, l.Dir)
	select {
	case <-ctx.Done():
		return 0
	case <-l.Daemon().Done():
		fmt.Fprintln(os.Stderr, "the daemon ended")
		return 1
	}
}

type demo struct {
	*lab.Lab
	ctx  context.Context
	rows [][]string
	ok   bool
}

// row notes one line of the table; want and got decide whether it is as it should be.
func (d *demo) row(step, who, want, got, note string) {
	mark := "ok"
	if want != got {
		mark, d.ok = "WRONG, want "+want, false
	}
	d.rows = append(d.rows, []string{step, who, got, mark, note})
}

func (d *demo) show() {
	planner := d.add("planner", "hsm", "ed25519", plannerUID)
	researcher := d.add("researcher", "tpm", "ecdsa-p256", researcherUID)
	mallory := d.add("mallory", "hsm", "ed25519", 64103)
	if d.ok {
		d.packets(planner, researcher, mallory)
		d.batches(planner)
		d.faults(planner, researcher)
		d.doctor()
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "\nSTEP\tBY\tRESULT\t\tREASON OR DETAIL")
	for _, r := range d.rows {
		fmt.Fprintln(w, strings.Join(r, "\t"))
	}
	w.Flush()
}

type agent struct{ Alias, PEM, Grade string }

// add registers an agent and returns the name that packets know it by.
func (d *demo) add(id, backend, alg string, uid int) agent {
	r := d.Root(d.ctx, nil, "agent", "add", id, "--backend", backend, "--algorithm", alg, "--uid", fmt.Sprint(uid), "-o", "json")
	var a struct {
		Aliases []string `json:"aliases"`
		PEM     string   `json:"pem"`
		Grade   string   `json:"grade"`
		KeyURI  string   `json:"key_uri"`
	}
	_ = json.Unmarshal([]byte(r.Stdout), &a)
	got := "registered"
	if r.Code != 0 || len(a.Aliases) == 0 {
		d.row("register "+id, "root", "registered", fmt.Sprintf("exit %d", r.Code), r.Stderr)
		return agent{}
	}
	d.row("register "+id, "root", "registered", got, fmt.Sprintf("%s in %s, used by uid %d", alg, strings.SplitN(a.KeyURI, ":", 2)[0], uid))
	return agent{a.Aliases[0], a.PEM, a.Grade}
}

func (d *demo) packets(planner, researcher, mallory agent) {
	task := func(to string, more string) []byte {
		return []byte(fmt.Sprintf(`{"task_id":"task-7","to_agent":%q,"intent":"Summarise this week's papers on key rotation",
"context":{"topic":"key rotation","papers":3},"permissions":{"allowed_actions":["read","search"],"max_tool_calls":5},"risk_level":"read"%s}`, to, more))
	}
	signed := d.As(d.ctx, plannerUID, task(researcher.Alias, ""), "sign", "--agent", "planner")
	d.row("sign a task packet", "planner", "signed", signedOr(signed), lastLine(signed.Stderr))
	if signed.Code != 0 {
		return
	}
	packet := []byte(signed.Stdout)

	d.verify("verify it", "ACCEPT", "", packet, researcherUID, "researcher")
	d.verify("replayed", "REJECT", "replay_detected", packet, researcherUID, "researcher")
	fresh := d.As(d.ctx, plannerUID, task(researcher.Alias, ""), "sign").Stdout
	d.verify("tampered", "REJECT", "invalid_signature", []byte(strings.Replace(fresh, `"papers":3`, `"papers":4`, 1)), researcherUID, "researcher")
	d.verify("key substituted", "REJECT", "public_key_mismatch",
		[]byte(strings.Replace(fresh, jsonText(planner.PEM), jsonText(mallory.PEM), 1)), researcherUID, "researcher")
	d.verify("wrong audience", "REJECT", "wrong_audience", []byte(fresh), 64103, "mallory")
	d.verify("expired", "REJECT", "expired", []byte(d.expired(researcher)), researcherUID, "researcher")
	stolen := d.As(d.ctx, researcherUID, task(planner.Alias, ""), "sign", "--agent", "planner", "-o", "json")
	d.row("sign as the planner", "researcher", "denied", code(stolen), "exit code "+fmt.Sprint(stolen.Code))

	reply := d.As(d.ctx, researcherUID, task(planner.Alias, ""), "sign")
	d.row("sign a reply", "researcher", "signed", signedOr(reply), lastLine(reply.Stderr))
	d.verify("verify the reply", "ACCEPT", "", []byte(reply.Stdout), plannerUID, "planner")
}

// doctor shows that all is well at the end.
func (d *demo) doctor() {
	doctor := d.Root(d.ctx, nil, "doctor")
	d.row("doctor", "root", "4", fmt.Sprint(doctor.Code), "exit code 4: healthy, with the warning that there is one operator alone")
}

// expired returns a packet that was right once: it was issued and expired in the past. Its signer's key is a software
// key made here and registered from its public half alone, since the daemon signs nothing that has expired.
func (d *demo) expired(to agent) string {
	return oldPacket(d, to)
}

func (d *demo) verify(step, want, reason string, packet []byte, uid uint32, who string) {
	r := d.As(d.ctx, uid, packet, "verify", "-o", "json")
	var v struct{ Decision, Reason string }
	if json.Unmarshal([]byte(r.Stdout), &v) != nil {
		d.row(step, who, want, fmt.Sprintf("exit %d", r.Code), r.Stderr)
		return
	}
	if v.Reason != reason {
		d.row(step, who, want+" "+reason, v.Decision, v.Reason)
		return
	}
	d.row(step, who, want, v.Decision, v.Reason)
}

func signedOr(r lab.Result) string {
	if r.Code == 0 {
		return "signed"
	}
	return fmt.Sprintf("exit %d", r.Code)
}

// code returns the stable code of a failed command.
func code(r lab.Result) string {
	var e struct {
		Error struct{ Code string }
	}
	_ = json.Unmarshal([]byte(r.Stderr), &e)
	return e.Error.Code
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return lines[len(lines)-1]
}

// jsonText returns s as it stands inside a JSON string.
func jsonText(s string) string {
	b, _ := json.Marshal(s)
	return strings.Trim(string(b), `"`)
}
