package main

import (
	"log/slog"

	"github.com/spf13/cobra"

	"github.com/trustd/trustd/internal/config"
	"github.com/trustd/trustd/internal/daemon"
)

func (a *app) serveCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "serve",
		Short: "Run the daemon in the foreground",
		Long: `Serve runs the daemon until it is told to stop (SIGTERM, SIGINT); a stop finishes what is in flight. It takes its
sockets from systemd where systemd passes them and says when it is ready.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.load()
			if err != nil {
				return err
			}
			log := a.logger(c)
			slog.SetDefault(log)
			return daemon.Run(cmd.Context(), c, daemon.Options{Version: version, Log: log})
		},
	}
}

// logger returns the daemon's logger: standard error, in the configured format.
func (a *app) logger(c *config.Config) *slog.Logger {
	opts := &slog.HandlerOptions{Level: c.Log.SlogLevel()}
	if c.Log.Format == "json" {
		return slog.New(slog.NewJSONHandler(a.err, opts))
	}
	return slog.New(slog.NewTextHandler(a.err, opts))
}
