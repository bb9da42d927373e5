//go:build !cgo

// Command trustd-pkcs11 needs cgo; built without it, it only says so.
package main

import (
	"fmt"
	"os"
)

func main() {
	fmt.Fprintln(os.Stderr, "trustd-pkcs11 was built without cgo and cannot load a PKCS#11 module")
	os.Exit(1)
}
