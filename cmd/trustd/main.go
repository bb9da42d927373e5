// Command trustd holds the keys of a host's AI agents in an HSM or a TPM, signs what they send, verifies what they
// receive, and is its own command line: "trustd serve" runs the daemon, everything else asks it over its sockets.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], stdio{os.Stdin, os.Stdout, os.Stderr})
	stop()
	os.Exit(code)
}
