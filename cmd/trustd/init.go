package main

import (
	"fmt"
	"os"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/internal/daemon"
)

func (a *app) initCmd() *cobra.Command {
	var o daemon.InitOptions
	var uids []string
	cmd := &cobra.Command{
		Use:   "init",
		Short: "Write the genesis record: the first operator, this node, and who this authority is",
		Long: `Init makes a key for this node and one for the first operator in a backend, and writes the record from which all
trust in this registry descends. Its hash is the cluster id. Init runs once, before the first serve, without a daemon.`,
		Example: `  trustd init --origin agents.example.org --operator alice`,
		Args:    args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.load()
			if err != nil {
				return err
			}
			if len(uids) == 0 {
				uids = []string{strconv.Itoa(os.Getuid())}
			}
			for _, u := range uids {
				n, err := strconv.ParseUint(u, 10, 32)
				if err != nil {
					return fault.New(fault.Usage, "--operator-uid is a user id")
				}
				o.OperatorUIDs = append(o.OperatorUIDs, uint32(n))
			}
			r, err := daemon.Init(cmd.Context(), c, a.logger(c), o)
			if err != nil {
				return err
			}
			if a.output == "json" {
				return a.printJSON(r)
			}
			if err := a.pairs("cluster id", r.ClusterID, "origin", r.Origin, "operator", r.Operator, "operator key", r.OperatorKey,
				"node", r.Node, "node key", r.NodeKey); err != nil {
				return err
			}
			fmt.Fprintln(a.out, "\nnext: trustd serve")
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Origin, "origin", "", "name of this authority, in the form of a host name (default: this host's name)")
	f.StringVar(&o.Operator, "operator", "operator", "id of the first operator")
	f.StringVar(&o.Node, "node", "", "id of this node (default: node.<host name>)")
	f.StringVar(&o.Backend, "backend", "", "backend for both keys (default: the configuration's default)")
	f.StringSliceVar(&uids, "operator-uid", nil, "user that may act as the operator (default: you); may be repeated")
	return cmd
}
