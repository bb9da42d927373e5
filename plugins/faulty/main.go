// Command faulty is a plugin for tests: a backend that does what failing devices do. It wraps another backend, and a
// script in a file, which may change while it runs, says what goes wrong (see script). It protects nothing and is
// never installed.
//
// Its settings:
//
//	wraps     soft (the default): software keys; pkcs11: the PKCS#11 backend, with the script between it and the module;
//	          tpm: the TPM backend, with the script between it and the chip
//	script    path of the script
//	notes     path of the file to which the action "note" appends
//	parallel  how many signatures are made at once, where it is not what the backend says
//	keys      soft: path of the file in which the keys stand in the clear; left out, it is the serial
//	module, token, serial   pkcs11: as in the configuration of that kind
//	device    tpm: swtpm:path=...
//	dir       tpm: folder of the key blobs
//
// FAULTY_START says what is wrong with the process from its start: exit, hang, or noise instead of a handshake.
package main

import (
	"fmt"
	"io"
	"os"
	"strconv"

	"github.com/trustd/trustd/plugins"
	"github.com/trustd/trustd/signer"
)

func main() {
	switch os.Getenv("FAULTY_START") {
	case "exit":
		os.Exit(3)
	case "hang":
		select {}
	case "noise":
		fmt.Println("this is not a handshake")
		_, _ = io.Copy(io.Discard, os.Stdin)
	}
	os.Exit(plugins.Serve(open))
}

// open opens the backend that the settings choose, behind the script.
func open(s plugins.Settings) signer.Backend {
	b := &scripted{
		player: newPlayer(s.Values["script"], s.Values["notes"], s.Log), counts: map[signer.Class]uint64{},
	}
	b.parallel, _ = strconv.Atoi(s.Values["parallel"]) // 0 where it says nothing
	switch s.Values["wraps"] {
	case "pkcs11":
		b.Backend = openPKCS11(s, b.player)
	case "tpm":
		b.Backend = openTPM(s, b.player)
	default:
		b.Backend, b.loses = openSoft(s), true
	}
	return b
}

// refuse says on standard error, which the daemon logs, why there is no backend, and ends the process.
func refuse(what string, err error) {
	fmt.Fprintf(os.Stderr, "faulty: %s: %v\n", what, err)
	os.Exit(4)
}
