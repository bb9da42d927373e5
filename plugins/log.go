package plugins

import (
	"context"
	"fmt"
	"io"
	"log"
	"log/slog"

	"github.com/hashicorp/go-hclog"
)

// hclogger lets go-plugin log through slog. What go-plugin says of itself at info and below is of interest to
// nobody but its authors and goes out as debug.
type hclogger struct {
	log   *slog.Logger
	name  string
	args  []any
	quiet bool // warnings too are debug: the host says itself what happens to the child
}

var _ hclog.Logger = (*hclogger)(nil)

var slogLevels = map[hclog.Level]slog.Level{
	hclog.Trace: slog.LevelDebug - 4,
	hclog.Debug: slog.LevelDebug,
	hclog.Info:  slog.LevelDebug,
	hclog.Warn:  slog.LevelWarn,
	hclog.Error: slog.LevelWarn, // the supervisor decides what is an error, and says so itself
}

func (l *hclogger) Log(level hclog.Level, msg string, args ...any) {
	l.log.Log(context.Background(), l.level(level), msg, pairs(args)...)
}

func (l *hclogger) level(level hclog.Level) slog.Level {
	if l.quiet {
		return min(slogLevels[level], slog.LevelDebug)
	}
	return slogLevels[level]
}

func (l *hclogger) Trace(msg string, args ...any) { l.Log(hclog.Trace, msg, args...) }
func (l *hclogger) Debug(msg string, args ...any) { l.Log(hclog.Debug, msg, args...) }
func (l *hclogger) Info(msg string, args ...any)  { l.Log(hclog.Info, msg, args...) }
func (l *hclogger) Warn(msg string, args ...any)  { l.Log(hclog.Warn, msg, args...) }
func (l *hclogger) Error(msg string, args ...any) { l.Log(hclog.Error, msg, args...) }

func (l *hclogger) enabled(level hclog.Level) bool {
	return l.log.Enabled(context.Background(), l.level(level))
}

func (l *hclogger) IsTrace() bool { return l.enabled(hclog.Trace) }
func (l *hclogger) IsDebug() bool { return l.enabled(hclog.Debug) }
func (l *hclogger) IsInfo() bool  { return l.enabled(hclog.Info) }
func (l *hclogger) IsWarn() bool  { return l.enabled(hclog.Warn) }
func (l *hclogger) IsError() bool { return l.enabled(hclog.Error) }

func (l *hclogger) ImpliedArgs() []any   { return l.args }
func (l *hclogger) Name() string         { return l.name }
func (l *hclogger) SetLevel(hclog.Level) {}

func (l *hclogger) GetLevel() hclog.Level {
	for _, level := range []hclog.Level{hclog.Trace, hclog.Debug, hclog.Warn} {
		if l.enabled(level) {
			return level
		}
	}
	return hclog.Off
}

func (l *hclogger) With(args ...any) hclog.Logger {
	all := append(l.args[:len(l.args):len(l.args)], args...)
	return &hclogger{log: l.log.With(pairs(args)...), name: l.name, args: all, quiet: l.quiet}
}

func (l *hclogger) Named(name string) hclog.Logger {
	if l.name != "" {
		name = l.name + "." + name
	}
	return l.ResetNamed(name)
}

func (l *hclogger) ResetNamed(name string) hclog.Logger {
	return &hclogger{log: l.log, name: name, args: l.args, quiet: l.quiet}
}

func (l *hclogger) StandardLogger(*hclog.StandardLoggerOptions) *log.Logger {
	return slog.NewLogLogger(l.log.Handler(), slog.LevelDebug)
}

func (l *hclogger) StandardWriter(o *hclog.StandardLoggerOptions) io.Writer {
	return l.StandardLogger(o).Writer()
}

// pairs makes slog's arguments of hclog's: keys become text, a value without a key keeps one.
func pairs(args []any) []any {
	out := make([]any, 0, len(args)+1)
	for i := 0; i < len(args); i += 2 {
		if i+1 == len(args) {
			return append(out, "extra", args[i])
		}
		v := args[i+1]
		if f, ok := v.(hclog.Format); ok && len(f) > 0 {
			v = fmt.Sprintf(fmt.Sprint(f[0]), f[1:]...)
		}
		out = append(out, fmt.Sprint(args[i]), v)
	}
	return out
}
