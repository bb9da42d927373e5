package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/softhsm-test/tpmproxy"
)

// A script says what goes wrong. Each line is one JSON object, a rule; empty lines and lines that begin with # are
// skipped. Objects are flat; a member that a rule does not take, one that is there twice, or a value out of its bounds
// refuses the whole script, and the one before stays in force.
//
//	{"at": "C_Sign", "nth": 3, "do": "return", "code": "CKR_DEVICE_ERROR"}
//
// "at" names the call: an operation of the backend (Sign, Generate, Open, Find, Keys, Destroy, Import), a function of
// PKCS#11 (C_Sign) or a command of the TPM (TPM2_Sign). A name that ends in * stands for all that begin so.
//
// When a rule acts is said by members that may be left out: it acts on each of its calls then.
//
//	"nth": n      on the n-th call alone; it goes with none of the others
//	"every": n    on each n-th call
//	"after": n    not on the first n calls
//	"times": n    n times at most
//	"p": x        with the probability x, drawn from "seed" (0)
//
// "do" says what the rule does. All rules that act on a call do so in their order, up to the first that ends the call.
//
//	"delay"       waits "ms", or as long as a log-normal distribution of "p50_ms" and "p95_ms" draws
//	"rate"        makes one signature at a time, each lasting 1/"per_second" seconds; at a call that signs
//	"note"        appends a line of 64 bytes to the file of notes
//	"drop"        loses all sessions: they are closed behind the backend's back, a TPM's connection is cut
//	"corrupt"     changes one bit of the signature; at a call that signs
//	"return"      ends the call with "code": a CKR_* or TPM_RC_*, by name or as 0x..., or, at an operation, a class of
//	              error such as session_lost
//	"hang"        does not come back until the script changes
//	"freeze"      stops the whole process (SIGSTOP)
//	"exit"        ends the process with "status" (1)
//	"crash"       ends the process by SIGSEGV
//
// A rule without "at" and "do" says where the token is while the rule stands: {"token": "gone"} is unplugged,
// "empty" shows no key, and "other" is another token of the same label, with no key.
type script struct {
	token string

	mu    sync.Mutex
	rules []*rule
}

// A rule is a line of a script with what it has counted.
type rule struct {
	at                       string
	nth, every, after, times uint64
	p                        float64
	seed                     uint64
	random                   *rand.Rand
	seen, acted              uint64
	action
}

// An action is what a rule does.
type action struct {
	do     string
	delay  tpmproxy.Distribution
	gap    time.Duration // of a rate: how long one signature lasts
	code   uint32        // CKR_* or TPM_RC_*
	class  signer.Class
	status int
}

// Bounds of a script.
const (
	maxScript = 64 << 10
	maxRules  = 256
	maxWait   = time.Hour
)

// The names of calls.
var (
	operations = []string{"Sign", "Generate", "Open", "Find", "Keys", "Destroy", "Import"}
	functions  = []string{
		"C_Initialize", "C_Finalize", "C_GetSlotList", "C_GetTokenInfo", "C_GetMechanismList", "C_GetMechanismInfo",
		"C_OpenSession", "C_CloseSession", "C_GetSessionInfo", "C_Login", "C_FindObjectsInit", "C_FindObjects",
		"C_FindObjectsFinal", "C_GetAttributeValue", "C_GenerateKeyPair", "C_CreateObject", "C_DestroyObject", "C_SignInit",
		"C_Sign",
	}
	commands = map[string]uint32{
		"TPM2_Create": 0x153, "TPM2_CreatePrimary": 0x131, "TPM2_ContextLoad": 0x161, "TPM2_ContextSave": 0x162,
		"TPM2_EvictControl": 0x120, "TPM2_FlushContext": 0x165, "TPM2_GetCapability": 0x17a, "TPM2_GetRandom": 0x17b,
		"TPM2_Import": 0x156, "TPM2_Load": 0x157, "TPM2_ReadClock": 0x181, "TPM2_ReadPublic": 0x173, "TPM2_Sign": 0x15d,
		"TPM2_StartAuthSession": 0x176, "TPM2_Startup": 0x144, "TPM2_TestParms": 0x18a,
	}
)

// members lists what each action takes besides "at" and "do" and the members that say when; those before the bar are
// needed.
var members = map[string]string{
	"delay": "| ms p50_ms p95_ms", "rate": "per_second |", "note": "|", "drop": "|", "corrupt": "|", "return": "code |",
	"hang": "|", "freeze": "|", "exit": "| status", "crash": "|",
}

// parseScript reads a script. An error names the line, and no value in it.
func parseScript(text []byte) (*script, error) {
	if len(text) > maxScript {
		return nil, fmt.Errorf("a script has at most %d bytes", maxScript)
	}
	s := &script{}
	n := 0
	for line := range bytes.Lines(text) {
		n++
		line = bytes.TrimSpace(line)
		if len(line) == 0 || line[0] == '#' {
			continue
		}
		if err := s.add(line); err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
	}
	return s, nil
}

func (s *script) add(line []byte) error {
	o, err := flat(line)
	if err != nil {
		return err
	}
	if _, ok := o["token"]; ok {
		return s.addToken(o)
	}
	if len(s.rules) == maxRules {
		return fmt.Errorf("a script has at most %d rules", maxRules)
	}
	r := &rule{}
	if err := r.read(o); err != nil {
		return err
	}
	s.rules = append(s.rules, r)
	return nil
}

func (s *script) addToken(o object) error {
	where, err := o.text("token")
	if err != nil {
		return err
	}
	if len(o) > 1 || !slices.Contains([]string{"gone", "empty", "other"}, where) {
		return errors.New(`a token is "gone", "empty" or "other", and stands alone`)
	}
	if s.token != "" {
		return errors.New("there is one token")
	}
	s.token = where
	return nil
}

// read fills a rule from the object.
func (r *rule) read(o object) (err error) {
	if r.at, err = o.text("at"); err != nil {
		return err
	}
	if r.do, err = o.text("do"); err != nil {
		return err
	}
	takes, ok := members[r.do]
	if !ok {
		return errors.New("do: there is no such action")
	}
	if err := checkAt(r.at); err != nil {
		return err
	}
	needs, may, _ := strings.Cut(takes, "|")
	when := []string{"at", "do", "nth", "every", "after", "times", "p", "seed"}
	for name := range o {
		if !slices.Contains(when, name) && !slices.Contains(strings.Fields(needs+" "+may), name) {
			return errors.New("this action takes no member of that name")
		}
	}
	for _, name := range strings.Fields(needs) {
		if _, ok := o[name]; !ok {
			return fmt.Errorf("%s is missing", name)
		}
	}
	if err := r.readWhen(o); err != nil {
		return err
	}
	return r.readAction(o)
}

func checkAt(at string) error {
	prefix, many := strings.CutSuffix(at, "*")
	for _, known := range [][]string{operations, functions} {
		begins := func(name string) bool { return strings.HasPrefix(name, prefix) }
		if slices.Contains(known, at) || many && slices.ContainsFunc(known, begins) {
			return nil
		}
	}
	for name := range commands {
		if name == at || many && strings.HasPrefix(name, prefix) {
			return nil
		}
	}
	return errors.New("at: there is no such call")
}

func (r *rule) readWhen(o object) error {
	for name, into := range map[string]*uint64{
		"nth": &r.nth, "every": &r.every, "after": &r.after, "times": &r.times, "seed": &r.seed,
	} {
		if _, ok := o[name]; !ok {
			continue
		}
		n, err := o.count(name)
		if err != nil {
			return err
		}
		*into = n
	}
	if _, ok := o["p"]; ok {
		p, err := o.number("p", 0, 1)
		if err != nil || p == 0 {
			return errors.New("p: not a probability above 0")
		}
		r.p = p
	}
	if r.nth > 0 && (r.every > 0 || r.after > 0 || r.times > 0 || r.p > 0) {
		return errors.New("nth: it goes with no other condition")
	}
	r.random = rand.New(rand.NewPCG(r.seed, 0))
	return nil
}

// signing are the calls whose result is a signature.
func signing(at string) bool { return at == "Sign" || at == "C_Sign" || at == "TPM2_Sign" }

func (r *rule) readAction(o object) (err error) {
	switch r.do {
	case "delay":
		r.delay, err = o.distribution(r.seed)
	case "rate":
		var n float64
		if n, err = o.number("per_second", 0.01, 1e6); err == nil {
			r.gap = time.Duration(float64(time.Second) / n)
		}
	case "return":
		err = r.readCode(o)
	case "exit":
		r.status = 1
		if _, ok := o["status"]; ok {
			var n uint64
			n, err = o.count("status")
			r.status = int(n & 0xff)
		}
	}
	if err == nil && (r.do == "rate" || r.do == "corrupt") && !signing(r.at) {
		return errors.New("at: this action is for calls that sign")
	}
	if err == nil && r.do == "drop" && !strings.HasPrefix(r.at, "C_") && !strings.HasPrefix(r.at, "TPM2_") {
		return errors.New("at: an operation of the backend has no sessions")
	}
	return err
}

// readCode reads what the call returns, which depends on the layer.
func (r *rule) readCode(o object) error {
	name, err := o.text("code")
	if err != nil {
		return err
	}
	codes := returnValues
	switch {
	case strings.HasPrefix(r.at, "TPM2_"):
		codes = responseCodes
	case strings.HasPrefix(r.at, "C_"):
	default:
		if r.class = signer.Class(name); !slices.Contains(signer.Classes(), r.class) {
			return errors.New("code: there is no such class")
		}
		return nil
	}
	if digits, ok := strings.CutPrefix(name, "0x"); ok {
		n, err := strconv.ParseUint(digits, 16, 32)
		if err != nil || n == 0 {
			return errors.New("code: a number has one to eight hexadecimal digits and is not 0")
		}
		r.code = uint32(n)
		return nil
	}
	code, ok := codes[name]
	if !ok {
		return errors.New("code: this call has no such code")
	}
	r.code = code
	return nil
}

// next counts a call and returns what is done to it.
func (s *script) next(call string) []action {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []action
	for _, r := range s.rules {
		if r.due(call) {
			out = append(out, r.action)
		}
	}
	return out
}

// due counts a call and reports whether the rule acts on it.
func (r *rule) due(call string) bool {
	if prefix, many := strings.CutSuffix(r.at, "*"); call != r.at && !(many && strings.HasPrefix(call, prefix)) {
		return false
	}
	r.seen++
	switch {
	case r.nth > 0:
		return r.seen == r.nth
	case r.seen <= r.after, r.times > 0 && r.acted >= r.times:
		return false
	case r.every > 0 && (r.seen-r.after)%r.every != 0:
		return false
	case r.p > 0 && r.random.Float64() >= r.p:
		return false
	}
	r.acted++
	return true
}

// An object is a flat JSON object: its values are strings and numbers.
type object map[string]any

// flat reads one flat object and nothing after it.
func flat(line []byte) (object, error) {
	d := json.NewDecoder(bytes.NewReader(line))
	d.UseNumber()
	open, err := d.Token()
	if err != nil || open != json.Delim('{') {
		return nil, errors.New("not a JSON object")
	}
	o := object{}
	for d.More() {
		name, err := d.Token()
		if err != nil {
			return nil, errors.New("not a JSON object")
		}
		value, err := d.Token()
		if err != nil {
			return nil, errors.New("not a JSON object")
		}
		key := name.(string) // the decoder takes no other
		if _, twice := o[key]; twice {
			return nil, errors.New("a member is there twice")
		}
		switch value.(type) {
		case string, json.Number:
			o[key] = value
		default:
			return nil, errors.New("values are strings and numbers")
		}
	}
	if _, err := d.Token(); err != nil {
		return nil, errors.New("not a JSON object")
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("something follows the object")
	}
	return o, nil
}

func (o object) text(name string) (string, error) {
	s, ok := o[name].(string)
	if !ok {
		return "", fmt.Errorf("%s: a string is missing", name)
	}
	return s, nil
}

func (o object) number(name string, least, most float64) (float64, error) {
	n, ok := o[name].(json.Number)
	if !ok {
		return 0, fmt.Errorf("%s: a number is missing", name)
	}
	x, err := n.Float64()
	if err != nil || x < least || x > most {
		return 0, fmt.Errorf("%s: the number is not within %v and %v", name, least, most)
	}
	return x, nil
}

// count reads a whole number from 1 on; a seed and an exit status may be 0.
func (o object) count(name string) (uint64, error) {
	n, ok := o[name].(json.Number)
	if !ok {
		return 0, fmt.Errorf("%s: a number is missing", name)
	}
	x, err := strconv.ParseUint(n.String(), 10, 63)
	if err != nil || x == 0 && name != "seed" && name != "status" || name == "status" && x > 255 {
		return 0, fmt.Errorf("%s: not a whole number in its bounds", name)
	}
	return x, nil
}

// distribution reads how long a delay is: "ms", or "p50_ms" and "p95_ms".
func (o object) distribution(seed uint64) (tpmproxy.Distribution, error) {
	ms := func(name string) (time.Duration, error) {
		x, err := o.number(name, 0.001, float64(maxWait.Milliseconds()))
		return time.Duration(x * float64(time.Millisecond)), err
	}
	_, one := o["ms"]
	_, two := o["p50_ms"]
	_, three := o["p95_ms"]
	if one == two || two != three {
		return nil, errors.New("a delay has ms, or p50_ms and p95_ms")
	}
	if one {
		d, err := ms("ms")
		return tpmproxy.Constant(d), err
	}
	p50, err := ms("p50_ms")
	if err != nil {
		return nil, err
	}
	p95, err := ms("p95_ms")
	if err != nil || p95 < p50 {
		return nil, errors.New("p95_ms: not a number from p50_ms on")
	}
	return tpmproxy.LogNormal(p50, p95, seed), nil
}
