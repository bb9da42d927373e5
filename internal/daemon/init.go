package daemon

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"os"
	"strings"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/internal/clock"
	"github.com/trustd/trustd/internal/config"
	"github.com/trustd/trustd/internal/service"
	"github.com/trustd/trustd/signer"
)

// InitOptions say who founds an authority.
type InitOptions struct {
	Origin       string // "" for this host's name
	Operator     string
	OperatorUIDs []uint32 // who may act as the operator
	Node         string   // "" for "node." and this host's name
	Backend      string   // "" for the default
}

// Founded is what an Init has made.
type Founded struct {
	ClusterID   string `json:"cluster_id"`
	Origin      string `json:"origin"`
	Operator    string `json:"operator"`
	OperatorKey string `json:"operator_key"`
	Node        string `json:"node"`
	NodeKey     string `json:"node_key"`
}

// Init writes the genesis record into the state folder of a daemon that is not running.
func Init(ctx context.Context, c *config.Config, log *slog.Logger, o InitOptions) (_ Founded, err error) {
	o.Backend = cmp.Or(o.Backend, c.Node.Backend)
	f, err := founding(o)
	if err != nil {
		return Founded{}, err
	}
	if len(c.Backends) == 0 {
		return Founded{}, &fault.Error{Code: fault.NotFound, Field: "backend", Text: "the configuration names no backend",
			Hint: "trustd key probe --module, --device or --dir prints a block to paste."}
	}
	st, err := openState(c, clock.System())
	if err != nil {
		return Founded{}, err
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	var out Founded
	err = with(ctx, c, log, func(ctx context.Context, set *backendSet) error {
		svc := service.New(service.Config{
			Registry: st.journal, Views: st.views, Keyring: st.keyring, Backends: set.list, History: st.history, Spend: st.spend,
			Clock: st.clock, Policy: c.VerifyPolicy(), Log: log, MaxNonces: c.Verify.MaxNonces,
			Canaries: canaryDir(c), MinGrade: signer.Grade(c.Keys.MinGrade),
		})
		if err := svc.Found(ctx, f); err != nil {
			return err
		}
		r := st.journal.State()
		out = Founded{ClusterID: r.ClusterID().String(), Origin: r.Origin(), Operator: f.Operator.String(), Node: f.Node.String()}
		for _, a := range r.Operators() {
			out.OperatorKey = a.Current().Public.ID().String()
		}
		for _, a := range r.Nodes() {
			out.NodeKey = a.Current().Public.ID().String()
		}
		return nil
	})
	return out, err
}

func founding(o InitOptions) (service.Founding, error) {
	host, err := os.Hostname()
	if err != nil {
		host = "localhost"
	}
	host = strings.ToLower(host)
	f := service.Founding{Origin: cmp.Or(o.Origin, host), Backend: o.Backend}
	if f.Operator, err = ident.ParseAgentID(o.Operator); err != nil {
		return f, err
	}
	if f.Node, err = ident.ParseAgentID(cmp.Or(o.Node, "node."+host)); err != nil {
		return f, err
	}
	for _, uid := range o.OperatorUIDs {
		f.Bindings = append(f.Bindings, api.Binding{Selector: api.Selector{UID: &uid}, Verbs: []string{api.VerbOperate}})
	}
	return f, nil
}
