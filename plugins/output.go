package plugins

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"
)

const attrGroup = "@attributes"

// childLog writes what the plugin process logs as a line of JSON each, in the form of hclog, for the host to read on
// the other end of its standard error.
func childLog(level slog.Leveler) *slog.Logger {
	rename := func(groups []string, a slog.Attr) slog.Attr {
		if len(groups) > 0 {
			return a
		}
		switch a.Key {
		case slog.LevelKey:
			return slog.String("@level", strings.ToLower(a.Value.String()))
		case slog.MessageKey:
			a.Key = "@message"
		case slog.TimeKey:
			return slog.String("@timestamp", a.Value.Time().Format("2006-01-02T15:04:05.000000Z07:00"))
		}
		return a
	}
	// In a group of their own, attributes of the plugin cannot be taken for these.
	h := slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{Level: level, ReplaceAttr: rename})
	return slog.New(h.WithGroup(attrGroup))
}

// An output folds what a child writes into the daemon's log: its own messages with their level and attributes and
// the daemon's time; and each line of the module or the run time as one message. A child that writes without end is
// cut short, and the log says how many lines are missing.
type output struct {
	log *slog.Logger

	mu      sync.Mutex
	left    float64 // lines that may still be written now
	at      time.Time
	missing int
	crash   string // how the report of a crash began: a signal's name, or "panic"
}

const (
	outputBurst = 200 // the report of a crash has about as many
	outputRate  = 10  // lines a second
	maxText     = 2 << 10
)

func newOutput(log *slog.Logger) *output { return &output{log: log, left: outputBurst, at: time.Now()} }

// crashed returns a word for the crash that the child has reported; "" for none.
func (o *output) crashed() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.crash
}

// read logs lines until r ends. A line that does not fit into r's buffer becomes several.
func (o *output) read(stream string, r *bufio.Reader) {
	for {
		line, err := r.ReadSlice('\n')
		o.line(stream, line)
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			o.flush()
			return
		}
	}
}

// writer returns a writer for what the child's own code writes once it serves, which comes through gRPC.
func (o *output) writer(stream string) io.Writer { return &lines{out: o, stream: stream} }

type lines struct {
	out    *output
	stream string
	rest   []byte
}

func (l *lines) Write(p []byte) (int, error) {
	l.rest = append(l.rest, p...)
	for {
		line, rest, ok := bytes.Cut(l.rest, []byte("\n"))
		if !ok && len(l.rest) < maxLine {
			return len(p), nil
		}
		l.out.line(l.stream, line)
		l.rest = slices.Clone(rest)
	}
}

func (o *output) line(stream string, text []byte) {
	text = bytes.TrimSpace(text)
	if len(text) == 0 {
		return
	}
	level, msg, args := o.parse(stream, text)
	if !o.log.Enabled(context.Background(), level) {
		return
	}
	ok, missed := o.take()
	if !ok {
		return
	}
	o.report(missed)
	o.log.Log(context.Background(), level, msg, args...)
}

// take counts a line in, and returns how many were left out before it.
func (o *output) take() (ok bool, missed int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	now := time.Now()
	o.left = min(o.left+now.Sub(o.at).Seconds()*outputRate, outputBurst)
	o.at = now
	if o.left < 1 {
		o.missing++
		return false, 0
	}
	o.left--
	missed, o.missing = o.missing, 0
	return true, missed
}

func (o *output) flush() {
	o.mu.Lock()
	missed := o.missing
	o.missing = 0
	o.mu.Unlock()
	o.report(missed)
}

func (o *output) report(missed int) {
	if missed > 0 {
		o.log.Warn("the plugin writes too much; lines were left out", "lines", missed)
	}
}

// parse makes a message of a line.
func (o *output) parse(stream string, text []byte) (slog.Level, string, []any) {
	if text[0] == '{' {
		var fields map[string]any
		if json.Unmarshal(text, &fields) == nil {
			if msg, ok := fields["@message"].(string); ok {
				level, _ := fields["@level"].(string)
				if ours, ok := fields[attrGroup].(map[string]any); ok {
					fields = ours
				}
				return levelOf(level), plain(msg), attributes(fields)
			}
		}
	}
	level := slog.LevelInfo
	o.mu.Lock()
	if o.crash == "" {
		for _, signal := range []string{"SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL", "SIGFPE"} {
			if bytes.HasPrefix(text, []byte(signal+": ")) {
				o.crash = signal
			}
		}
		for _, begin := range []string{"panic: ", "fatal error: ", "runtime: "} {
			if bytes.HasPrefix(text, []byte(begin)) {
				o.crash = "panic"
			}
		}
	}
	if o.crash != "" {
		level = slog.LevelWarn
	}
	o.mu.Unlock()
	return level, "plugin output", []any{"stream", stream, "text", plain(string(text))}
}

// attributes returns what a message carries. The daemon's log has its own time and level, and says whose message it is.
func attributes(fields map[string]any) []any {
	var args []any
	for _, key := range slices.Sorted(maps.Keys(fields)) {
		name := plain(key)
		switch key {
		case slog.TimeKey, slog.LevelKey, slog.MessageKey, "backend":
			name = "plugin_" + key
		}
		if !strings.HasPrefix(key, "@") {
			args = append(args, name, fields[key])
		}
	}
	return args
}

func levelOf(name string) slog.Level {
	switch strings.ToLower(name) {
	case "trace":
		return slog.LevelDebug - 4
	case "debug":
		return slog.LevelDebug
	case "warn":
		return slog.LevelWarn
	case "error":
		return slog.LevelError
	}
	return slog.LevelInfo
}

// plain bounds a text and takes out what could move a terminal's cursor.
func plain(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s[:min(len(s), maxText)], "?"))
}
