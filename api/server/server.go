// Package server is the HTTP face of package api: it maps each route of a Unix socket to one method of api.Agent
// or api.Admin and back. It knows who calls (package caller), reads requests strictly, and is the one place where
// an error becomes what a caller sees: its code and what is safe to say go out, its cause goes to the log.
package server

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"log/slog"
	"net/http"
	"path"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/api/wire"
	"github.com/trustd/trustd/caller"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/internal/clock"
)

// Config is what a Handler is made of.
type Config struct {
	Agent   api.Agent            // required
	Admin   api.Admin            // nil on agent.sock: its routes are not there
	Clock   clock.Clock          // nil for the machine's
	Log     *slog.Logger         // nil for none
	Limiter *caller.Limiter      // nil for no limits; handlers of several sockets may share one
	Metrics *prometheus.Registry // nil for one of its own; /metrics shows all of it; sockets may share one
	Version string               // of the daemon, for the Server header
	Budget  *Budget              // of the memory for bodies; nil for one of its own; sockets may share one
	Timeout time.Duration        // bounds the work on one request, streams aside; 0 is 30 seconds
	// Draining, once closed, ends streams after what they have read and refuses new requests with stopping. Shutdown
	// of the http.Server does the same by itself. May be nil.
	Draining <-chan struct{}
}

// A Handler serves one socket. It is safe for concurrent use.
type Handler struct {
	Config
	socket   string // agent or admin
	mux      *http.ServeMux
	metrics  *metrics
	replies  *replies
	refusals throttle
	shutdown chan struct{} // closed by stop
	stop     func()
	server   []string // the Server header
	idPrefix string
	lastID   atomic.Uint64
}

const defaultTimeout = 30 * time.Second

// New returns the handler of one socket.
func New(c Config) *Handler {
	if c.Agent == nil {
		panic("api/server: Config.Agent is required")
	}
	if c.Clock == nil {
		c.Clock = clock.System()
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Metrics == nil {
		c.Metrics = prometheus.NewRegistry()
	}
	if c.Budget == nil {
		c.Budget = NewBudget()
	}
	if c.Timeout == 0 {
		c.Timeout = defaultTimeout
	}
	h := &Handler{
		Config: c, socket: "agent", mux: http.NewServeMux(), replies: newReplies(c.Clock), shutdown: make(chan struct{}),
		server: []string{"trustd/" + c.Version}, idPrefix: newIDPrefix(),
	}
	if c.Admin != nil {
		h.socket = "admin"
	}
	h.metrics = newMetrics(c.Metrics, h.socket)
	h.stop = sync.OnceFunc(func() { close(h.shutdown) })
	for i := range table {
		if rt := &table[i]; !rt.admin || c.Admin != nil {
			h.handle(rt.name(), rt)
		}
	}
	h.handle("/", &noRoute)
	return h
}

func (h *Handler) handle(pattern string, rt *route) {
	stats := h.metrics.of(rt.name())
	h.mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) { h.serve(rt, stats, w, r) })
}

// stopping reports whether new requests are to be refused.
func (h *Handler) stopping() bool {
	select {
	case <-h.Draining: // a nil channel is never ready
		return true
	case <-h.shutdown:
		return true
	default:
		return false
	}
}

// HTTPServer returns a server for listeners of package caller, with the time limits that fit: none on a stream,
// which sets its own. Its Shutdown drains h.
func HTTPServer(h *Handler) *http.Server {
	s := &http.Server{
		Handler:                      h,
		ConnContext:                  caller.ConnContext,
		ConnState:                    caller.ConnState,
		DisableGeneralOptionsHandler: true,
		ReadHeaderTimeout:            10 * time.Second,
		ReadTimeout:                  h.Timeout + 30*time.Second, // ends a request's context too, so longer than its work
		WriteTimeout:                 h.Timeout + 60*time.Second,
		IdleTimeout:                  5 * time.Minute,
		MaxHeaderBytes:               16 << 10,
		ErrorLog:                     slog.NewLogLogger(h.Log.Handler(), slog.LevelDebug),
	}
	s.RegisterOnShutdown(h.stop)
	return s
}

// ServeHTTP serves one request.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	// The mux would answer a path that is not clean with a redirect.
	if p := r.URL.EscapedPath(); !strings.HasPrefix(p, "/") || path.Clean(p) != p {
		r.URL.Path, r.URL.RawPath = "/-", ""
	}
	h.mux.ServeHTTP(w, r)
}

func newIDPrefix() string {
	var b [4]byte
	rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:]) + "-"
}

// An exchange is one request and its reply.
type exchange struct {
	handler *Handler
	route   *route
	stats   *routeStats
	agent   api.Agent
	admin   api.Admin
	w       http.ResponseWriter
	r       *http.Request
	ctx     context.Context
	id      string
	caller  *caller.Caller
	release func() // of the caller's limits
	held    int64  // of the budget, by the body
	raw     []byte // the body, once read
	hasRaw  bool
	status  int  // of a reply that is no error; 0 is 200
	started bool // a part of the reply is on its way
	code    fault.Code
}

// serve takes a request through admission, its route's work and the reply.
func (h *Handler) serve(rt *route, stats *routeStats, w http.ResponseWriter, r *http.Request) {
	begun := h.Clock.Boot()
	id := h.idPrefix + strconv.FormatUint(h.lastID.Add(1), 16)
	x := &exchange{
		handler: h, route: rt, stats: stats, agent: h.Agent, admin: h.Admin,
		w: w, r: r, ctx: r.Context(), id: id, release: func() {},
	}
	header := w.Header()
	header["X-Request-Id"] = []string{id}
	header["Server"] = h.server
	stats.inFlight.Inc()
	defer func() { // also where a reply is cut off, which is a panic to the end
		stats.inFlight.Dec()
		stats.done(x.code, rt.stream, h.Clock.Boot()-begun)
	}()
	defer func() {
		if p := recover(); p != nil {
			x.fail(panicked(p))
		}
	}()
	if err := x.run(); err != nil {
		x.fail(err)
	}
}

func (x *exchange) run() error {
	defer func() {
		x.release()
		if x.held > 0 {
			x.handler.Budget.give(x.caller.UID, x.held)
		}
	}()
	if err := x.admit(); err != nil {
		x.handler.metrics.refuse(fault.CodeOf(err))
		return err
	}
	if x.route.stream {
		_, err := x.route.work(x)
		return err
	}
	ctx, cancel := context.WithTimeout(x.ctx, x.handler.Timeout)
	defer cancel()
	x.ctx = ctx
	return x.perform()
}

// reply sends v.
func (x *exchange) reply(v any) error {
	if v == nil {
		return nil
	}
	b := borrowBuffer()
	defer returnBuffer(b)
	var err error
	if *b, err = wire.AppendReply(*b, v); err != nil {
		return fault.Wrap(fault.Internal, err, "")
	}
	*b = append(*b, '\n')
	status := x.status
	if status == 0 {
		status = http.StatusOK
	}
	x.write(status, typeJSON, *b)
	return nil
}

var (
	typeJSON    = []string{"application/json"}
	typeProblem = []string{"application/problem+json"}
	typeLines   = []string{"application/x-ndjson"}
)

// write sends a whole reply. An error of the write is the caller's going away, which nobody is left to hear of.
func (x *exchange) write(status int, contentType []string, body []byte) {
	x.started = true
	header := x.w.Header()
	header["Content-Type"] = contentType
	header["Content-Length"] = []string{strconv.Itoa(len(body))}
	x.w.WriteHeader(status)
	x.w.Write(body)
}
