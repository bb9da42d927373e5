package packet

import (
	"strconv"
	"sync"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/internal/pyjson"
)

// Parse reads one complete signed packet, strictly: each text that TrustHandoff takes for the same packet although
// it was written otherwise is refused, but for members that are null by default and may be left out (packet.md
// 1.10). Input over MaxTask is too_large, anything else that is wrong is malformed and names the field.
//
// Parse does not judge: expired packets, unknown risk levels, lifetimes against the policy and ai_provenance without
// a source parse, so that the gate refuses them in its order, after the signature. CheckTTL and CheckAIProvenance
// are those two checks.
func Parse(b []byte) (*Task, error) { return parse(b, signed) }

// A mode says which members a text must have.
type mode uint8

const (
	signed   mode = iota // a packet on the wire
	unsigned             // the same without signature: what is about to be signed
	draft                // what a caller wants to have signed
)

// required lists the members that must be there, as bits; null does not count.
var required = [...]uint32{
	signed:   bits(always, fieldSignature),
	unsigned: bits(always),
	draft:    bits([]field{fieldIntent, fieldPermissions, fieldTaskID, fieldToAgent}),
}

var always = []field{
	fieldExpiresAt, fieldFromAgent, fieldIntent, fieldIssuedAt, fieldNonce, fieldPacketID, fieldPermissions,
	fieldPublicKey, fieldSignatureAlgo, fieldTaskID, fieldToAgent,
}

func bits(fs []field, more ...field) (set uint32) {
	for _, f := range append(more, fs...) {
		set |= 1 << f
	}
	return set
}

// A parser holds what one pass needs and the next one can use again.
type parser struct {
	scan pyjson.Scanner
	form pyjson.Form
	vals []byte           // the values in canonical form, in the order of the wire
	at   [fieldCount]span // of each value in vals
	seen uint32           // members on the wire
	set  uint32           // members on the wire that are not null
}

var parsers = sync.Pool{New: func() any { return new(parser) }}

func parse(b []byte, m mode) (*Task, error) {
	if len(b) > MaxTask {
		return nil, fault.New(fault.TooLarge, "a packet has at most %d bytes", MaxTask)
	}
	p := parsers.Get().(*parser)
	defer p.release()
	return p.parse(b, m)
}

func (p *parser) parse(b []byte, m mode) (*Task, error) {
	t := &Task{wire: string(b)}
	if err := p.read(t, pyjson.Sorted); err != nil {
		return nil, root(err)
	}
	if m != signed && p.seen&(1<<fieldSignature) != 0 {
		return nil, fault.BadField("signature", "a packet to be signed has none")
	}
	if missing := required[m] &^ p.set; missing != 0 {
		return nil, missingField(missing)
	}
	const newer = 1<<fieldRiskLevel | 1<<fieldTTLSeconds | 1<<fieldAIProvenance
	t.older = t.older && p.seen&newer == 0
	if m != draft {
		p.resolveTTL(t)
	}
	p.assemble(t)
	return t, nil
}

// root gives an error that has no field one.
func root(err error) error {
	f := fault.From(err)
	if f.Field == "" {
		f.Field = "packet"
	}
	return f
}

func missingField(missing uint32) error {
	for f, name := range fieldNames {
		if missing&(1<<f) != 0 {
			return fault.BadField(name, "the field is missing")
		}
	}
	return nil
}

func (p *parser) release() {
	p.scan.Reset("", pyjson.Sorted)
	if cap(p.vals) > 64<<10 {
		p.vals = nil
	}
	parsers.Put(p)
}

// read scans t.wire into t and p.
func (p *parser) read(t *Task, form pyjson.Form) error {
	p.form, p.vals, p.seen, p.set = form, p.vals[:0], 0, 0
	p.scan.Reset(t.wire, form)
	t.older = true
	if err := p.scan.Open('{'); err != nil {
		return err
	}
	for first := true; ; first = false {
		more, err := p.scan.Next(first, '}')
		if err != nil {
			return err
		}
		if !more {
			return p.scan.End()
		}
		name, err := p.scan.Key()
		if err != nil {
			return err
		}
		f := fieldOf(name)
		if f == fieldCount {
			return pyjson.At(fault.BadField("", "the format has no such field"), name)
		}
		if p.seen&(1<<f) != 0 {
			return fault.BadField(name, "the field occurs twice")
		}
		p.seen |= 1 << f
		lo := len(p.vals)
		if err := p.value(t, f); err != nil {
			return pyjson.At(err, name)
		}
		p.at[f] = span{lo, len(p.vals)}
	}
}

// optional lists the members that may be null.
var optional = bits([]field{
	fieldAIProvenance, fieldCapabilityToken, fieldConstraints, fieldExpiresAt, fieldGoal, fieldProvenance,
	fieldRiskLevel, fieldTaskType, fieldTTLSeconds,
})

// value reads the value of one member into t and appends its canonical form to p.vals.
func (p *parser) value(t *Task, f field) error {
	if optional&(1<<f) != 0 {
		null, err := p.scan.Null()
		if null || err != nil {
			p.vals = append(p.vals, "null"...)
			return err
		}
	}
	p.set |= 1 << f
	switch f {
	case fieldPacketID:
		return p.name(&t.PacketID)
	case fieldTaskID:
		return p.name(&t.TaskID)
	case fieldFromAgent:
		return p.name(&t.FromAgent)
	case fieldToAgent:
		return p.name(&t.ToAgent)
	case fieldNonce:
		return p.name(&t.Nonce)
	case fieldSignatureAlgo:
		return p.name(&t.SignatureAlgo)
	case fieldIntent:
		return p.text(&t.Intent)
	case fieldGoal:
		return p.optionalText(&t.Goal)
	case fieldTaskType:
		return p.optionalText(&t.TaskType)
	case fieldCapabilityToken:
		return p.optionalText(&t.CapabilityToken)
	case fieldRiskLevel:
		return p.optionalText(&t.RiskLevel)
	case fieldTTLSeconds:
		return p.optionalInt(&t.TTLSeconds)
	case fieldIssuedAt:
		return p.time(&t.IssuedAt)
	case fieldExpiresAt:
		return p.time(&t.ExpiresAt)
	case fieldMemoryRefs:
		return p.texts(&t.MemoryRefs)
	case fieldPermissions:
		return p.permissions(&t.Permissions)
	case fieldConstraints:
		return p.constraints(t)
	case fieldProvenance:
		return p.provenance(t)
	case fieldContext:
		return p.free()
	case fieldAIProvenance:
		return p.aiProvenance(t)
	case fieldPublicKey:
		return p.publicKey(t)
	default:
		return p.signature(t)
	}
}

func (p *parser) text(v *string) (err error) {
	p.vals, *v, err = p.scan.AppendText(p.vals)
	return err
}

// name reads a string that names something.
func (p *parser) name(v *string) error {
	if err := p.text(v); err != nil {
		return err
	}
	if *v == "" || len(*v) > MaxName {
		return fault.BadField("", "not a string of 1 to %d bytes", MaxName)
	}
	return nil
}

func (p *parser) optionalText(v *Optional[string]) error {
	v.Set = true
	return p.text(&v.Value)
}

func (p *parser) optionalInt(v *Optional[int64]) (err error) {
	v.Value, err = p.scan.Int(maxInt)
	v.Set = true
	p.vals = strconv.AppendInt(p.vals, v.Value, 10)
	return err
}

func (p *parser) texts(v *[]string) error {
	if err := p.scan.Open('['); err != nil {
		return err
	}
	p.vals = append(p.vals, '[')
	for {
		n := len(*v)
		more, err := p.scan.Next(n == 0, ']')
		if err != nil {
			return err
		}
		if !more {
			p.vals = append(p.vals, ']')
			return nil
		}
		if n > 0 {
			p.vals = append(p.vals, ',')
		}
		var s string
		if err := p.text(&s); err != nil {
			return pyjson.At(err, strconv.Itoa(n))
		}
		*v = append(*v, s)
	}
}

// free reads an object whose members are the sender's own.
func (p *parser) free() (err error) {
	p.vals, err = p.scan.Object(p.vals)
	return err
}

func (p *parser) aiProvenance(t *Task) error {
	lo := len(p.vals)
	if err := p.free(); err != nil {
		return err
	}
	t.AIProvenance.Present = true
	if v, ok := pyjson.Lookup(string(p.vals[lo:]), "source"); ok && v[0] == '"' {
		var s pyjson.Scanner
		s.Reset(string(v), pyjson.Sorted)
		t.AIProvenance.Source, _ = s.Text()
	}
	return nil
}

// resolveTTL fills in what TrustHandoff fills in after it has parsed and before it builds the signed bytes.
func (p *parser) resolveTTL(t *Task) {
	if t.TTLSeconds.Set && !t.RiskLevel.Set {
		t.RiskLevel = Optional[string]{RiskRead, true}
		p.put(fieldRiskLevel, `"read"`)
	}
	if ttl, known := formatTTL(t.RiskLevel); known && !t.TTLSeconds.Set {
		t.TTLSeconds = Optional[int64]{ttl, true}
		p.put(fieldTTLSeconds, strconv.FormatInt(ttl, 10))
	}
}

// formatTTL returns the lifetime that the format gives a risk level.
func formatTTL(risk Optional[string]) (int64, bool) {
	switch {
	case !risk.Set:
		return 0, false
	case risk.Value == RiskWrite:
		return formatWriteTTL, true
	case risk.Value == RiskRead:
		return formatReadTTL, true
	}
	return 0, false
}

// put sets the canonical form of a value.
func (p *parser) put(f field, value string) {
	lo := len(p.vals)
	p.vals = append(p.vals, value...)
	p.at[f] = span{lo, len(p.vals)}
	p.seen |= 1 << f
}

// assemble builds the signed bytes of the values in the order of their names.
func (p *parser) assemble(t *Task) {
	out := make([]byte, 0, len(p.vals)+headSize+len(fieldNames)*len("null"))
	for f := range fieldCount {
		if f == fieldSignature {
			t.at[f] = span{len(out), len(out)}
			continue
		}
		out = append(out, heads[f]...)
		lo := len(out)
		out = p.appendValue(out, f)
		t.at[f] = span{lo, len(out)}
	}
	t.signing = append(out, '}')
}

func (p *parser) appendValue(out []byte, f field) []byte {
	switch {
	case p.seen&(1<<f) != 0:
		return append(out, p.vals[p.at[f].lo:p.at[f].hi]...)
	case f == fieldContext:
		return append(out, "{}"...)
	case f == fieldMemoryRefs:
		return append(out, "[]"...)
	}
	return append(out, "null"...)
}
