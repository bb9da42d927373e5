package registry

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"slices"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/internal/jcs"
	"github.com/trustd/trustd/internal/merkle"
	"github.com/trustd/trustd/signature"
)

// Limits on a record. What is larger is refused before it is parsed.
const (
	MaxRecord     = 64 << 10 // bytes of a marshalled record
	maxSignatures = 32       // each costs a public-key operation; no threshold is larger
	maxType       = 32
)

// A Record is a signed change to the registry.
type Record struct {
	Type       string
	Body       []byte // canonical JSON (RFC 8785) of the body that goes with Type
	Signatures []Sig  // in ascending order of Key, each key once
}

// A Sig is the signature of one key. That of the key which a record introduces is a proof of possession and signs
// PossessionBytes; all others sign SigningBytes.
type Sig struct {
	Key ident.KeyID
	Sig []byte // raw, as package signature verifies it
}

// SigningBytes returns what the signatures of the record sign. The cluster of a genesis record is the zero value.
func (r *Record) SigningBytes(cluster ClusterID) []byte {
	return signature.Encode(signature.Record, cluster[:], []byte(r.Type), r.Body)
}

// PossessionBytes returns what a new key signs to prove that its holder asked for this very registration.
func (r *Record) PossessionBytes(cluster ClusterID, id ident.AgentID, key ident.PublicKey) []byte {
	body := sha256.Sum256(r.Body)
	return signature.Encode(signature.Possession, cluster[:], []byte(r.Type), []byte(id.String()), key.SPKI(), body[:])
}

// AddSignature puts a signature in its place, instead of an earlier one by the same key.
func (r *Record) AddSignature(key ident.KeyID, sig []byte) {
	at, found := slices.BinarySearchFunc(r.Signatures, key, func(s Sig, k ident.KeyID) int {
		return bytes.Compare(s.Key[:], k[:])
	})
	s := Sig{Key: key, Sig: bytes.Clone(sig)}
	r.Signatures = slices.Clone(r.Signatures) // a copy of the record may share them
	if found {
		r.Signatures[at] = s
		return
	}
	r.Signatures = slices.Insert(r.Signatures, at, s)
}

// At returns the time that the author of the record put into it, or the zero time where it holds none.
func (r *Record) At() time.Time {
	var b struct {
		At        time.Time `json:"at"`
		CreatedAt time.Time `json:"created_at"`
	}
	if json.Unmarshal(r.Body, &b) != nil {
		return time.Time{}
	}
	if b.At.IsZero() {
		return b.CreatedAt
	}
	return b.At
}

// Marshal returns the one text of a record: canonical JSON with the members body, signatures and type.
func (r *Record) Marshal() ([]byte, error) {
	if err := r.check(); err != nil {
		return nil, err
	}
	b := append([]byte(`{"body":`), r.Body...)
	b = append(b, `,"signatures":[`...)
	for i, s := range r.Signatures {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(b, `{"key":"`+s.Key.String()+`","sig":"`...)
		b = base64.StdEncoding.AppendEncode(b, s.Sig)
		b = append(b, `"}`...)
	}
	b = append(b, `],"type":"`+r.Type+`"}`...)
	if len(b) > MaxRecord {
		return nil, fault.New(fault.TooLarge, "a record has at most %d bytes", MaxRecord)
	}
	return b, nil
}

// UnmarshalRecord reads what Marshal writes, and nothing else: another spelling of the same record is refused. It
// checks the form only; Apply judges the rest.
func UnmarshalRecord(b []byte) (Record, error) {
	if len(b) > MaxRecord {
		return Record{}, fault.New(fault.TooLarge, "a record has at most %d bytes", MaxRecord)
	}
	var wire struct {
		Body       json.RawMessage `json:"body"`
		Signatures []struct {
			Key ident.KeyID `json:"key"`
			Sig []byte      `json:"sig"`
		} `json:"signatures"`
		Type string `json:"type"`
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&wire); err != nil {
		return Record{}, fault.Wrap(fault.Malformed, err, "not a record")
	}
	r := Record{Type: wire.Type, Body: bytes.Clone(wire.Body)}
	for _, s := range wire.Signatures {
		r.Signatures = append(r.Signatures, Sig{Key: s.Key, Sig: s.Sig})
	}
	again, err := r.Marshal()
	if err != nil {
		return Record{}, err
	}
	if !bytes.Equal(again, b) {
		return Record{}, fault.New(fault.Malformed, "the record is not in canonical form")
	}
	return r, nil
}

// check looks at the form of a record, without knowing what its type demands of the body.
func (r *Record) check() error {
	if r.Type == "" || len(r.Type) > maxType {
		return fault.BadField("type", "a record type has 1 to %d bytes", maxType)
	}
	for i := 0; i < len(r.Type); i++ {
		if c := r.Type[i]; (c < 'a' || c > 'z') && c != '.' && c != '_' {
			return fault.BadField("type", "a record type is made of a-z, '.' and '_'")
		}
	}
	if len(r.Body) > MaxRecord {
		return fault.New(fault.TooLarge, "a record has at most %d bytes", MaxRecord)
	}
	canon, err := jcs.Transform(r.Body)
	if err != nil || len(canon) == 0 || canon[0] != '{' || !bytes.Equal(canon, r.Body) {
		return fault.BadField("body", "not an object in canonical JSON (RFC 8785)")
	}
	if len(r.Signatures) > maxSignatures {
		return fault.BadField("signatures", "a record has at most %d signatures", maxSignatures)
	}
	for i, s := range r.Signatures {
		if i > 0 && bytes.Compare(r.Signatures[i-1].Key[:], s.Key[:]) >= 0 {
			return fault.BadField("signatures", "not in ascending order of their keys")
		}
		if len(s.Sig) == 0 || len(s.Sig) > 1024 {
			return fault.BadField("signatures", "not a signature")
		}
	}
	return nil
}

// leaf returns the record's hash in the Merkle tree: of one byte that tells whether it was accepted, then type,
// body and each signature's key and bytes, all behind their lengths. It exists for every record, also for one that
// has no Marshal.
func (r *Record) leaf(accepted bool) merkle.Hash {
	b := []byte{0}
	if accepted {
		b[0] = 1
	}
	field := func(f []byte) {
		b = binary.BigEndian.AppendUint32(b, uint32(len(f)))
		b = append(b, f...)
	}
	field([]byte(r.Type))
	field(r.Body)
	for _, s := range r.Signatures {
		field(s.Key[:])
		field(s.Sig)
	}
	return merkle.LeafHash(b)
}
