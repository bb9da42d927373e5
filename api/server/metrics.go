package server

import (
	"errors"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/trustd/trustd/fault"
)

// metrics counts what goes over one socket. Labels come from the route table and the codes of package fault alone,
// so that no caller can make them grow.
type metrics struct {
	socket   string
	requests *prometheus.CounterVec
	items    *prometheus.CounterVec
	refused  *prometheus.CounterVec
	latency  *prometheus.HistogramVec
	inFlight *prometheus.GaugeVec
	text     http.Handler
}

// codeOK is the label of what went well.
const codeOK = "ok"

func newMetrics(reg *prometheus.Registry, socket string) *metrics {
	return &metrics{
		socket: socket,
		requests: register(reg, prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "trustd_requests_total", Help: "Requests answered, by route and code.",
		}, []string{"socket", "route", "code"})),
		items: register(reg, prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "trustd_items_total", Help: "Items of batches and lines of streams answered, by route and code.",
		}, []string{"socket", "route", "code"})),
		refused: register(reg, prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "trustd_callers_refused_total", Help: "Requests refused before their work began, by code.",
		}, []string{"socket", "code"})),
		latency: register(reg, prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "trustd_request_seconds", Help: "Time from a request's header to the end of its reply, streams aside.",
			Buckets: []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30},
		}, []string{"socket", "route"})),
		inFlight: register(reg, prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "trustd_requests_in_flight", Help: "Requests being served.",
		}, []string{"socket", "route"})),
		text: promhttp.HandlerFor(reg, promhttp.HandlerOpts{DisableCompression: true}),
	}
}

// register registers c, or returns what another socket has registered before.
func register[C prometheus.Collector](reg *prometheus.Registry, c C) C {
	err := reg.Register(c)
	var before prometheus.AlreadyRegisteredError
	if errors.As(err, &before) {
		return before.ExistingCollector.(C)
	}
	if err != nil {
		panic("api/server: " + err.Error())
	}
	return c
}

func (m *metrics) refuse(c fault.Code) { m.refused.WithLabelValues(m.socket, label(c)).Inc() }

// label returns the label of a code.
func label(c fault.Code) string {
	switch {
	case c == "":
		return codeOK
	case c.Known():
		return string(c)
	}
	return string(fault.Internal)
}

// routeStats are the metrics of one route, looked up once.
type routeStats struct {
	metrics  *metrics
	route    string
	ok       prometheus.Counter
	itemOK   prometheus.Counter
	latency  prometheus.Observer
	inFlight prometheus.Gauge
}

func (m *metrics) of(route string) *routeStats {
	return &routeStats{
		metrics: m, route: route,
		ok:       m.requests.WithLabelValues(m.socket, route, codeOK),
		itemOK:   m.items.WithLabelValues(m.socket, route, codeOK),
		latency:  m.latency.WithLabelValues(m.socket, route),
		inFlight: m.inFlight.WithLabelValues(m.socket, route),
	}
}

func (s *routeStats) done(c fault.Code, stream bool, took time.Duration) {
	if c == "" {
		s.ok.Inc()
	} else {
		s.metrics.requests.WithLabelValues(s.metrics.socket, s.route, label(c)).Inc()
	}
	if !stream {
		s.latency.Observe(took.Seconds())
	}
}

func (s *routeStats) item(c fault.Code) {
	if c == "" {
		s.itemOK.Inc()
		return
	}
	s.metrics.items.WithLabelValues(s.metrics.socket, s.route, label(c)).Inc()
}
