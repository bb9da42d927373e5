package signature_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/asn1"
	"encoding/binary"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
)

// TestOpenSSL verifies batched signatures with another implementation, by hand: the root is climbed to and the statement
// written as docs/formats/batch.md says, and openssl(1) checks the device's signature of it.
func TestOpenSSL(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		if os.Getenv("CI") != "" || os.Getenv("TRUSTD_REQUIRE_HSM") != "" {
			t.Fatal("no openssl")
		}
		t.Skip("no openssl")
	}
	verify := func(t *testing.T, key, statement, sig []byte, options ...string) bool {
		t.Helper()
		dir := t.TempDir()
		args := append([]string{"pkeyutl", "-verify", "-pubin", "-rawin"}, options...)
		for option, content := range map[string][]byte{"-inkey": key, "-in": statement, "-sigfile": sig} {
			path := filepath.Join(dir, option)
			if err := os.WriteFile(path, content, 0o600); err != nil {
				t.Fatal(err)
			}
			args = append(args, option, path)
		}
		return exec.Command(openssl, args...).Run() == nil
	}
	for _, c := range []struct {
		key     string
		options []string
	}{
		{"ed25519", nil},
		{"p256", []string{"-digest", "sha256"}},
		{"p384", []string{"-digest", "sha384"}},
		{"rsa", []string{"-digest", "sha256", "-pkeyopt", "rsa_padding_mode:pss", "-pkeyopt", "rsa_pss_saltlen:32"}},
	} {
		t.Run(c.key, func(t *testing.T) {
			l := newLot(t, c.key, 11)
			const index = 9
			b := bytesOf(t, l.sign(index).Text())
			path, sig := b[head:len(b)-len(l.raw)], b[len(b)-len(l.raw):]

			node := sha256.Sum256(leafBytes(l.subjects[index], l.salts[index]))
			take := func(left bool) {
				pair := slices.Concat([]byte{1}, node[:], path[:32])
				if left {
					pair = slices.Concat([]byte{1}, path[:32], node[:])
				}
				node, path = sha256.Sum256(pair), path[32:]
			}
			take(true)  // of 11: 9 is odd, and 8 on its left
			take(false) // of 6: 4 is even, and 5 on its right
			take(true)  // of 3, 2 is alone and goes up; of 2: 1 is odd, and 0 on its left
			if len(path) != 0 {
				t.Fatalf("%d bytes of the path are left", len(path))
			}
			statement := []byte("trustd-batch/v1\x00")
			id, algorithm := sha256.Sum256(l.key.public.SPKI()), l.key.public.Algorithm().String()
			for _, field := range [][]byte{id[:], []byte(algorithm), {0, 0, 0, 11}, node[:]} {
				statement = append(binary.BigEndian.AppendUint32(statement, uint32(len(field))), field...)
			}
			if half := len(sig) / 2; c.key == "p256" || c.key == "p384" {
				sig, err = asn1.Marshal(struct{ R, S *big.Int }{new(big.Int).SetBytes(sig[:half]), new(big.Int).SetBytes(sig[half:])})
				if err != nil {
					t.Fatal(err)
				}
			}
			key := []byte(l.key.public.PEM())
			if !verify(t, key, statement, sig, c.options...) {
				t.Error("openssl refuses the signature")
			}
			bent := bytes.Clone(statement)
			bent[len(bent)-1] ^= 1
			if verify(t, key, bent, sig, c.options...) {
				t.Error("openssl takes a signature of another root")
			}
		})
	}
}
