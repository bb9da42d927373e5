package service

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/trustd/trustd/internal/keyring"
	"github.com/trustd/trustd/signer"
)

// An Alert is something that is not as it was configured or registered.
type Alert struct {
	Kind    string
	Agent   string // whose key; "" for an alert of a backend
	Backend string
	Text    string // safe to show
	Remedy  string
}

// The kinds of alerts.
const (
	AlertBackendNotReady = "backend_not_ready" // a backend that holds keys does not sign
	AlertCanaryGone      = "canary_gone"       // a device was emptied or replaced
	AlertKeyOrphaned     = "key_orphaned"      // a device lost a key
	AlertBackendMissing  = "backend_missing"   // the configuration does not name the backend of a key
	AlertKindMismatch    = "kind_mismatch"     // a key is of another kind than its backend
	AlertGradeLowered    = "grade_lowered"     // a key is of a lower grade than was registered
	AlertGradeTooLow     = "grade_too_low"     // a key is of a lower grade than keys.min_grade
)

var alertKinds = []string{AlertBackendNotReady, AlertCanaryGone, AlertKeyOrphaned, AlertBackendMissing, AlertKindMismatch,
	AlertGradeLowered, AlertGradeTooLow}

// A Holder is what is known of the backend of a key, for KeyAlerts.
type Holder struct {
	Kind      string // in the configuration
	Described signer.Description
	Opened    signer.Grade // of the key itself, where it was opened; else ""
}

// grade returns the grade that a key has as far as is known; "" where nothing is. A device that has not been asked says
// nothing, and one that may hold attested keys does not say which of them are.
func (h *Holder) grade() signer.Grade {
	switch {
	case h.Opened != "":
		return h.Opened
	case h.Described.Grade == signer.Software && len(h.Described.Algorithms) > 0:
		return signer.Software
	}
	return ""
}

// KeyAlerts returns what is not as it should be with one key. registered is the grade that others were told, h nil where
// the configuration does not name the key's backend.
func KeyAlerts(e *keyring.Entry, registered, least signer.Grade, h *Holder) []Alert {
	var out []Alert
	add := func(kind, text, remedy string) {
		out = append(out, Alert{Kind: kind, Agent: e.AgentID.String(), Backend: e.Backend, Text: text, Remedy: remedy})
	}
	if o := e.Orphaned; o != nil {
		add(AlertKeyOrphaned, "the key is not used since "+o.At.Format(time.RFC3339)+": "+o.Reason,
			"Restore the token or TPM, then run trustd key recheck AGENT.")
	}
	if h == nil {
		add(AlertBackendMissing, "the configuration names no backend "+e.Backend,
			"Put the backend back into the configuration; the key waits there.")
		h = &Holder{}
	} else if u, err := signer.ParseURI(e.URI); err == nil && u.Scheme != h.Kind && u.Scheme != h.Described.Kind &&
		(h.Described.Kind != "" || ownKind(h.Kind)) {
		add(AlertKindMismatch, "the key is a "+u.Scheme+" key, and the backend "+e.Backend+" is of another kind",
			"Correct the backend's block in the configuration: another device has its name.")
	}
	now := h.grade()
	if now != "" && !now.AtLeast(registered) {
		add(AlertGradeLowered, fmt.Sprintf("the key is registered as %s and lives as %s", registered, now),
			"Others rely on the grade: revoke the agent, or put the key's device back.")
	}
	if now == "" {
		now = registered
	}
	if least != "" && !now.AtLeast(least) {
		add(AlertGradeTooLow, fmt.Sprintf("the key is %s, and keys.min_grade is %s", gradeText(now), least),
			"Register the agent anew with a key on a better device, or change keys.min_grade.")
	}
	return out
}

// ownKind reports whether keys on a backend of that kind have URIs of that scheme.
func ownKind(kind string) bool { return slices.Contains([]string{"pkcs11", "tpm", "soft"}, kind) }

func gradeText(g signer.Grade) string {
	if g == "" {
		return "of no known grade"
	}
	return string(g)
}

// alertsOf returns the alerts of one key of this host.
func (s *Service) alertsOf(e *keyring.Entry) []Alert {
	a, known := s.cfg.Views.Load().Registry.Agent(e.AgentID)
	if !known || a.Removed != nil {
		return nil
	}
	var h *Holder
	if b, err := s.backend(e.Backend); err == nil {
		h = &Holder{Kind: b.Kind, Described: b.monitor.Described()}
		s.keysMu.Lock()
		if k, ok := s.keys[e.AgentID]; ok && k.id == e.ID() {
			h.Opened = k.grade
		}
		s.keysMu.Unlock()
	}
	return KeyAlerts(e, signer.Grade(a.Current().Grade), s.cfg.MinGrade, h)
}

// alerts returns all alerts, those of backends first.
func (s *Service) alerts() []Alert {
	var out []Alert
	used := s.used()
	for i := range s.cfg.Backends {
		b := &s.cfg.Backends[i]
		if !b.monitor.Running() {
			continue
		}
		st := b.monitor.Status()
		if st.CanaryGone {
			out = append(out, Alert{Kind: AlertCanaryGone, Backend: b.Name, Text: st.Problem, Remedy: st.Remedy})
		}
		if st.State != signer.Ready && used[b.Name] {
			out = append(out, Alert{Kind: AlertBackendNotReady, Backend: b.Name, Text: st.Problem, Remedy: st.Remedy})
		}
	}
	for _, e := range s.cfg.Keyring.All() {
		out = append(out, s.alertsOf(e)...)
	}
	return out
}

// used returns the backends that hold keys of this host.
func (s *Service) used() map[string]bool {
	out := map[string]bool{}
	for _, e := range s.cfg.Keyring.All() {
		out[e.Backend] = true
	}
	return out
}

// shownAgents is how many agents an alert names.
const shownAgents = 5

// SumUp returns for each kind of the alerts of keys what is wrong and with which; several of one kind share a text.
func SumUp(alerts []Alert, each func(name, text, remedy string)) {
	byKind := map[string][]Alert{}
	for _, a := range alerts {
		if a.Agent != "" {
			byKind[a.Kind] = append(byKind[a.Kind], a)
		}
	}
	for _, kind := range slices.Sorted(maps.Keys(byKind)) {
		all := byKind[kind]
		text := all[0].Agent + ": " + all[0].Text
		if len(all) > 1 {
			var names []string
			for _, a := range all[:min(len(all), shownAgents)] {
				names = append(names, a.Agent)
			}
			text = fmt.Sprintf("%d keys: %s", len(all), strings.Join(names, ", "))
			if more := len(all) - shownAgents; more > 0 {
				text += fmt.Sprintf(" and %d more", more)
			}
			text += "; trustd agent show says more of each"
		}
		each(strings.ReplaceAll(kind, "_", " "), text, all[0].Remedy)
	}
}

// noteAlerts writes to the log which alerts of keys have come and gone since the last call. It has one caller.
func (s *Service) noteAlerts() {
	now := map[string]bool{}
	for _, a := range s.alerts() {
		if a.Agent == "" { // its monitor logs it
			continue
		}
		id := a.Kind + " " + a.Agent
		now[id] = true
		if !s.noted[id] {
			s.cfg.Log.Error("alert", "kind", a.Kind, "agent", a.Agent, "backend", a.Backend, "problem", a.Text, "remedy", a.Remedy)
		}
	}
	for id := range s.noted {
		if !now[id] {
			kind, agent, _ := strings.Cut(id, " ")
			s.cfg.Log.Info("alert ended", "kind", kind, "agent", agent)
		}
	}
	s.noted = now
}
