package verify

import (
	"github.com/trustd/trustd/fault"
)

// Lookup lets tests show the gate a registry that no record can bring about yet.
type Lookup = lookup

// Rows returns the reasons of the packet table.
func Rows() (out []fault.Code) {
	for _, c := range checks {
		out = append(out, c.reason)
	}
	return out
}

// MessageRows returns the reasons of the message table.
func MessageRows() (out []fault.Code) {
	for _, c := range messageChecks {
		out = append(out, c.reason)
	}
	return out
}

// CheckWithout is Check with one row switched off.
func CheckWithout(in Input, reg Lookup, off fault.Code) (Accepted, *fault.Error) {
	var table []check
	for _, c := range checks {
		if c.reason != off {
			table = append(table, c)
		}
	}
	return run(in, reg, table)
}

// CheckMessageWithout is CheckMessage with one row switched off.
func CheckMessageWithout(in MessageInput, reg Lookup, off fault.Code) (Verdict, *fault.Error) {
	var table []messageCheck
	for _, c := range messageChecks {
		if c.reason != off {
			table = append(table, c)
		}
	}
	return checkMessage(in, reg, table)
}

// CheckChainWith is CheckChain with another registry.
func CheckChainWith(in ChainInput, reg Lookup) ([]Verdict, int, *fault.Error) {
	return checkChain(in, reg)
}
