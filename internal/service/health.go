package service

import (
	"context"
	"fmt"
	"time"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/registry"
	"github.com/trustd/trustd/signer"
)

// The states of a health check.
const (
	healthOK      = "ok"
	healthWarning = "warning"
	healthFailure = "failure"
)

// Health says whether the daemon and each of its parts can serve. The daemon is ready with a registry and one
// backend that has lately signed, or with no backend at all, when it only verifies.
func (s *Service) Health(ctx context.Context) (api.Health, error) {
	st := s.cfg.Views.Load().Registry
	size, root := st.Head()
	h := api.Health{
		Version: s.cfg.Version, Uptime: int64((s.cfg.Clock.Boot() - s.started).Seconds()),
		Registry: api.RegistryHead{ClusterID: st.ClusterID().String(), Size: size, Root: digestText(root)},
	}
	add := func(name, status, text, remedy string) {
		h.Checks = append(h.Checks, api.HealthCheck{Name: name, Status: status, Text: text, Remedy: remedy})
	}
	if st.Initialised() {
		add("registry", healthOK, fmt.Sprintf("%d records, %d agents", size, st.Len()), "")
	} else {
		add("registry", healthFailure, "there is no genesis record", fault.NotInitialised.Hint())
	}
	if n := len(st.Operators()); n < max(st.Threshold(), 1) && st.Initialised() {
		add("operators", healthFailure, fmt.Sprintf("%d operators are left, %d must sign", n, st.Threshold()),
			"Nothing that needs an operator can change any more. Found a new authority, or restore a backup.")
	} else if n == 1 {
		add("operators", healthWarning, "one operator: whoever holds that key changes everything alone",
			"Register a second one: trustd agent add ID --role operator --uid UID.")
	} else {
		add("operators", healthOK, fmt.Sprintf("%d operators, %d must sign", n, st.Threshold()), "")
	}
	signs, used := len(s.cfg.Backends) == 0, s.used()
	for _, b := range s.describeAll(ctx, probePatience) {
		signs = signs || b.State == string(signer.Ready)
		c := BackendCheck(b, used[b.Name])
		add(c.Name, c.Status, c.Text, c.Remedy)
	}
	SumUp(s.alerts(), func(name, text, remedy string) { add(name, healthFailure, text, remedy) })
	if held, most := s.cfg.Spend.Len(), s.cfg.MaxNonces; held > most/10*9 {
		add("nonces", healthWarning, fmt.Sprintf("%d of %d places are taken", held, most), fault.ReplayStoreFull.Hint())
	} else {
		add("nonces", healthOK, fmt.Sprintf("%d of %d places are taken", held, most), "")
	}
	s.checkPending(st, add)
	h.Ready = st.Initialised() && signs
	return h, nil
}

// BackendCheck says how a backend fares: one that does not sign is a failure where keys of this host are on it.
func BackendCheck(b api.Backend, used bool) api.HealthCheck {
	c := api.HealthCheck{Name: "backend " + b.Name, Status: healthOK, Text: b.Device}
	if b.State == string(signer.Ready) {
		return c
	}
	c.Status, c.Text, c.Remedy = healthFailure, b.State, b.Remedy
	if !used {
		c.Status = healthWarning
	}
	if b.Since != nil {
		c.Text += " since " + b.Since.Format(time.RFC3339)
	}
	if b.Problem != "" {
		c.Text += ": " + b.Problem
	}
	if !used {
		c.Text += "; no key of this host is on it"
	}
	return c
}

// checkPending reports keys whose making or removal a crash or a lost device left unfinished.
func (s *Service) checkPending(st *registry.State, add func(name, status, text, remedy string)) {
	pending := 0
	if staged, err := s.cfg.Keyring.Staged(); err == nil {
		pending += len(staged)
	}
	for _, e := range s.cfg.Keyring.All() {
		if a, ok := st.Agent(e.AgentID); !ok || a.Removed != nil {
			pending++
		}
	}
	if pending > 0 {
		add("keys", healthWarning, fmt.Sprintf("%d keys wait to be destroyed", pending), "It happens by itself once their device answers.")
		return
	}
	add("keys", healthOK, fmt.Sprintf("%d keys of this host", len(s.cfg.Keyring.All())), "")
}
