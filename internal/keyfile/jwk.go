package keyfile

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"slices"
	"strings"

	"github.com/go-jose/go-jose/v4"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
)

// maxJWEIterations bounds what a file may ask for.
const maxJWEIterations = 1_000_000

const jwkContent = "jwk+json"

func encodeJWK(key any, pub ident.PublicKey, passphrase []byte) (string, error) {
	inner, err := jose.JSONWebKey{
		Key: key, KeyID: pub.ID().String(), Algorithm: joseName(pub.Algorithm()), Use: "sig",
	}.MarshalJSON()
	if err != nil {
		return "", fault.Wrap(fault.Internal, err, "")
	}
	enc, err := jose.NewEncrypter(jose.A256GCM, jose.Recipient{
		Algorithm: jose.PBES2_HS512_A256KW, Key: passphrase, PBES2Count: strength.jwk,
	}, (&jose.EncrypterOptions{}).WithContentType(jwkContent))
	if err != nil {
		return "", fault.Wrap(fault.Internal, err, "")
	}
	sealed, err := enc.Encrypt(inner)
	clear(inner)
	if err != nil {
		return "", fault.Wrap(fault.Internal, err, "")
	}
	text, err := sealed.CompactSerialize()
	if err != nil {
		return "", fault.Wrap(fault.Internal, err, "")
	}
	return text, nil
}

func decodeJWK(data string, passphrase []byte) (any, error) {
	data = strings.TrimSpace(data)
	if err := checkJWE(data); err != nil {
		return nil, err
	}
	sealed, err := jose.ParseEncryptedCompact(data,
		[]jose.KeyAlgorithm{jose.PBES2_HS512_A256KW, jose.PBES2_HS256_A128KW},
		[]jose.ContentEncryption{jose.A256GCM, jose.A128GCM, jose.A256CBC_HS512, jose.A128CBC_HS256})
	if err != nil {
		return nil, fault.BadField("private", "not a compact JWE under a passphrase")
	}
	inner, err := sealed.Decrypt(passphrase)
	if err != nil {
		return nil, refused(err)
	}
	defer clear(inner)
	// From here on the passphrase was right and the content is what its author wrote.
	if _, err := checkMembers(inner, privateMembers); err != nil {
		return nil, err
	}
	var jwk jose.JSONWebKey
	if err := jwk.UnmarshalJSON(inner); err != nil || jwk.IsPublic() || !jwk.Valid() {
		return nil, fault.BadField("private", "the JWE does not hold a private JSON Web Key")
	}
	_, pub, err := Canonical(jwk.Key)
	if err != nil {
		return nil, err
	}
	if err := checkJWKNames(jwk, pub.Algorithm(), "private"); err != nil {
		return nil, err
	}
	return jwk.Key, nil
}

// checkJWE bounds what the header of a compact JWE may ask for before it is acted on.
func checkJWE(text string) error {
	head, _, ok := strings.Cut(text, ".")
	raw, err := base64.RawURLEncoding.DecodeString(head)
	if !ok || err != nil {
		return fault.BadField("private", "not a compact JWE")
	}
	var h struct {
		Iterations  *int64          `json:"p2c"`
		Salt        string          `json:"p2s"`
		Compression json.RawMessage `json:"zip"`
	}
	if json.Unmarshal(raw, &h) != nil || h.Iterations == nil || *h.Iterations < 1 || h.Salt == "" {
		return fault.BadField("private", "the JWE is not under a passphrase (PBES2)")
	}
	if *h.Iterations > maxJWEIterations {
		return fault.New(fault.TooLarge, "the file asks for more than %d iterations of PBKDF2", maxJWEIterations)
	}
	if h.Compression != nil {
		return fault.BadField("private", "a compressed JWE is not supported")
	}
	return nil
}

// PublicJWK returns the key as a public JSON Web Key. Its kid is the fingerprint.
func PublicJWK(pub ident.PublicKey) ([]byte, error) {
	if pub.IsZero() {
		return nil, fault.New(fault.Internal, "no public key")
	}
	b, err := jose.JSONWebKey{
		Key: pub.Key(), KeyID: pub.ID().String(), Algorithm: joseName(pub.Algorithm()), Use: "sig",
	}.MarshalJSON()
	if err != nil {
		return nil, fault.Wrap(fault.Internal, err, "")
	}
	return b, nil
}

var (
	publicMembers  = []string{"kty", "crv", "x", "y", "n", "e", "alg", "use", "kid", "key_ops"}
	privateMembers = append([]string{"d", "p", "q", "dp", "dq", "qi"}, publicMembers...)
)

// ParsePublicJWK reads a public JSON Web Key. kid is a name that its author chose and is not looked at; a
// private key is refused, so that none is passed around as if it were public.
func ParsePublicJWK(data []byte) (ident.PublicKey, error) {
	if len(data) > MaxSize {
		return ident.PublicKey{}, fault.New(fault.TooLarge, "a key file has at most %d bytes", MaxSize)
	}
	names, err := checkMembers(data, privateMembers)
	if err != nil {
		return ident.PublicKey{}, err
	}
	if slices.ContainsFunc(names, func(n string) bool { return !slices.Contains(publicMembers, n) }) {
		return ident.PublicKey{}, fault.BadField("public_key", "the JSON Web Key holds a private key")
	}
	var jwk jose.JSONWebKey
	if err := jwk.UnmarshalJSON(data); err != nil || !jwk.Valid() || !jwk.IsPublic() {
		return ident.PublicKey{}, fault.BadField("public_key", "not a public JSON Web Key")
	}
	pub, err := ident.NewPublicKey(jwk.Key)
	if err != nil {
		return ident.PublicKey{}, err
	}
	if err := checkJWKNames(jwk, pub.Algorithm(), "public_key"); err != nil {
		return ident.PublicKey{}, err
	}
	return pub, nil
}

// checkMembers returns the names of the members of a JSON object, each of which must be allowed and stand once:
// certificates and URLs in a key are refused, not skipped.
func checkMembers(data []byte, allowed []string) ([]string, error) {
	bad := fault.BadField("jwk", "not a JSON Web Key, or one with a member that is not known or stands twice")
	dec := json.NewDecoder(bytes.NewReader(data))
	if tok, err := dec.Token(); err != nil || tok != json.Delim('{') {
		return nil, bad
	}
	var names []string
	for dec.More() {
		tok, err := dec.Token()
		name, ok := tok.(string)
		if err != nil || !ok || !slices.Contains(allowed, name) || slices.Contains(names, name) {
			return nil, bad
		}
		names = append(names, name)
		var value json.RawMessage
		if err := dec.Decode(&value); err != nil {
			return nil, bad
		}
	}
	if _, err := dec.Token(); err != nil || dec.More() {
		return nil, bad
	}
	return names, nil
}

// checkJWKNames refuses a key that says it is for something else than trustd would use it for.
func checkJWKNames(jwk jose.JSONWebKey, alg ident.Algorithm, field string) error {
	if jwk.Use != "" && jwk.Use != "sig" {
		return fault.BadField(field, "the JSON Web Key is not for signatures")
	}
	if jwk.Algorithm == "" || jwk.Algorithm == joseName(alg) || alg == ident.Ed25519 && jwk.Algorithm == "Ed25519" {
		return nil
	}
	return fault.BadField(field, "the JSON Web Key names an algorithm that trustd does not use with it")
}

// joseName returns the algorithm's name in JOSE (RFC 7518, RFC 8037), which for Ed25519 is not ours.
func joseName(alg ident.Algorithm) string {
	if alg == ident.Ed25519 {
		return string(jose.EdDSA)
	}
	return alg.Wire()
}
