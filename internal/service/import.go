package service

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/internal/keyfile"
	"github.com/trustd/trustd/internal/secret"
	"github.com/trustd/trustd/registry"
	"github.com/trustd/trustd/signer"
)

// ImportAgent registers an identity whose key is elsewhere, or takes in an encrypted private key.
func (s *Service) ImportAgent(ctx context.Context, r api.ImportAgentRequest) (api.AgentDetail, error) {
	s.admin.Lock()
	defer s.admin.Unlock()
	switch {
	case (len(r.Public) == 0) == (r.Private == ""):
		return api.AgentDetail{}, fault.BadField("public", "an import holds either a public identity or a private key")
	case r.Private != "":
		return s.importPrivate(ctx, r)
	}
	return s.importPublic(ctx, r)
}

// importPublic registers an identity from its export. Nobody proved here that its holder holds the key, so an
// operator must vouch for it, and the registry says so.
func (s *Service) importPublic(ctx context.Context, r api.ImportAgentRequest) (api.AgentDetail, error) {
	if len(r.Bindings) != 0 || r.Backend != "" || r.Passphrase != "" || r.Format != "" {
		return api.AgentDetail{}, fault.BadField("bindings", "an agent whose key is elsewhere has no callers, backend or passphrase here")
	}
	pub, id, err := readExport(r.Public, r.AgentID)
	if err != nil {
		return api.AgentDetail{}, err
	}
	n, err := s.checkImport(id, r)
	if err != nil {
		return api.AgentDetail{}, err
	}
	rec, err := registry.NewImport(registry.Import{
		AgentID: n.id, PublicKey: pub, Aliases: n.aliases, Metadata: r.Metadata, Level: n.level, CreatedAt: s.cfg.Clock.Now(),
	})
	if err != nil {
		return api.AgentDetail{}, err
	}
	if err := s.endorse(ctx, &rec, true); err != nil {
		return api.AgentDetail{}, err
	}
	if err := s.submit(ctx, rec); err != nil {
		return api.AgentDetail{}, err
	}
	return s.detail(ctx, n.id)
}

// readExport reads an export_public object. Its fingerprint is a claim: it is computed again and must agree.
func readExport(data json.RawMessage, id string) (ident.PublicKey, string, error) {
	var e api.Identity
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&e); err != nil {
		return ident.PublicKey{}, "", fault.Wrap(fault.Malformed, err, "not the export of a public identity")
	}
	pub, err := ident.ParsePublicKey(e.PublicKey)
	if err != nil {
		return ident.PublicKey{}, "", err
	}
	claimed, err := ident.ParseKeyID(e.Fingerprint)
	if err != nil {
		return ident.PublicKey{}, "", err
	}
	if claimed != pub.ID() || e.PEM != "" && e.PEM != pub.PEM() || e.Algorithm != "" && e.Algorithm != pub.Algorithm().String() {
		return ident.PublicKey{}, "", &fault.Error{Code: fault.FingerprintMismatch, Field: "public.fingerprint"}
	}
	return pub, cmp.Or(id, e.AgentID), nil
}

func (s *Service) checkImport(id string, r api.ImportAgentRequest) (newcomer, error) {
	return s.check(api.AddAgentRequest{AgentID: id, Backend: r.Backend, Aliases: r.Aliases, Metadata: r.Metadata, Level: r.Level, Bindings: r.Bindings})
}

// importPrivate takes an encrypted private key into a backend and registers its agent, which thereby proves that it
// holds the key.
func (s *Service) importPrivate(ctx context.Context, r api.ImportAgentRequest) (api.AgentDetail, error) {
	n, err := s.checkImport(r.AgentID, r)
	if err != nil {
		return api.AgentDetail{}, err
	}
	if n.backend, err = s.backend(r.Backend); err != nil {
		return api.AgentDetail{}, err
	}
	if err := s.checkBackend(ctx, n.backend); err != nil {
		return api.AgentDetail{}, err
	}
	importer, ok := n.backend.Backend.(signer.Importer)
	if !ok {
		return api.AgentDetail{}, &fault.Error{Code: fault.Unsupported, Field: "backend", Text: "this backend takes in no private keys"}
	}
	pass := []byte(r.Passphrase)
	defer secret.Zero(pass)
	pkcs8, pub, err := keyfile.Decode(keyfile.Format(r.Format), r.Private, pass)
	if err != nil {
		return api.AgentDetail{}, err
	}
	defer secret.Zero(pkcs8)
	if _, _, taken := s.cfg.Registry.State().ByKey(pub.ID()); taken {
		return api.AgentDetail{}, &fault.Error{Code: fault.KeyReused, Field: "private"}
	}
	return s.join(ctx, n, func(id signer.ID) (signer.Key, error) { return importer.Import(ctx, id, pkcs8) })
}

// ExportPrivate returns a soft key under a passphrase. No other backend gives a key out.
func (s *Service) ExportPrivate(ctx context.Context, name string, r api.ExportPrivateRequest) (api.ExportPrivateReply, error) {
	a, err := resolve(s.cfg.Registry.State(), name)
	if err != nil {
		return api.ExportPrivateReply{}, err
	}
	e, held := s.cfg.Keyring.Get(a.ID)
	if !held {
		return api.ExportPrivateReply{}, fault.New(fault.NoPrivateKey, "")
	}
	if e.Role != roleAgent {
		return api.ExportPrivateReply{}, fault.New(fault.NotExportable, "keys of operators and nodes stay where they are")
	}
	b, err := s.backend(e.Backend)
	if err != nil {
		return api.ExportPrivateReply{}, err
	}
	exporter, ok := b.Backend.(signer.Exporter)
	if !ok {
		return api.ExportPrivateReply{}, fault.New(fault.NotExportable, "")
	}
	pkcs8, err := exporter.Export(ctx, e.ID())
	if err != nil {
		return api.ExportPrivateReply{}, err
	}
	defer secret.Zero(pkcs8)
	pass := []byte(r.Passphrase)
	defer secret.Zero(pass)
	format := cmp.Or(keyfile.Format(r.Format), keyfile.PEM)
	text, err := keyfile.Encode(format, pkcs8, pass)
	if err != nil {
		return api.ExportPrivateReply{}, err
	}
	s.cfg.Log.Warn("a private key was exported", "agent", a.ID, "format", string(format))
	return api.ExportPrivateReply{Format: string(format), Data: text}, nil
}
