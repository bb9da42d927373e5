package daemon

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/trustd/trustd/internal/service"
	"github.com/trustd/trustd/signer"
)

// newMetrics returns the registry that /metrics shows: the Go run time, the process, and what the service holds.
func newMetrics(s *service.Service) *prometheus.Registry {
	r := prometheus.NewRegistry()
	process := collectors.NewProcessCollector(collectors.ProcessCollectorOpts{})
	r.MustRegister(collectors.NewGoCollector(), process, figures{s.Figures})
	return r
}

// figures collects what a service holds. Labels are names of backends in the configuration and words of our own.
type figures struct{ read func() service.Figures }

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("trustd_"+name, help, labels, nil)
}

var (
	agents  = desc("agents", "Agents, operators and nodes in the registry, whatever their status.")
	records = desc("registry_records", "Records in the registry.")
	keys    = desc("keys", "Keys that this host holds.")
	nonces  = desc("nonces", "Spent nonces that are kept.")
	alerts  = desc("alerts", "What is not as it was configured or registered, by kind.", "kind")

	backendState    = desc("backend_state", "1 for the state that the backend is in.", "backend", "state")
	backendChanges  = desc("backend_state_changes_total", "Changes into the state.", "backend", "state")
	backendFailures = desc("backend_failures_total", "Failures of the device by class, repaired ones included.",
		"backend", "class")
	backendLast     = desc("backend_last_signature_timestamp_seconds", "When the device last signed.", "backend")
	backendRestarts = desc("backend_restarts_total", "Restarts of the backend's process.", "backend")
	backendWaiting  = desc("backend_waiting_requests", "Requests in the device's queue.", "backend")
	backendSigned   = desc("backend_signatures_total", "Signatures that the device made, those of canaries included.",
		"backend", "mode")
	backendMessages = desc("backend_messages_total", "Messages that those signatures cover.", "backend", "mode")
	backendCanaries = desc("backend_canaries_total", "Signatures asked of the canary key.", "backend", "result")
	backendCanary   = desc("backend_canary_seconds", "Time of the canary key's last signature, the wait for its turn included.",
		"backend")
)

// Describe implements prometheus.Collector.
func (figures) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{agents, records, keys, nonces, alerts, backendState, backendChanges, backendFailures,
		backendLast, backendRestarts, backendWaiting, backendSigned, backendMessages, backendCanaries, backendCanary} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c figures) Collect(ch chan<- prometheus.Metric) {
	var gauge gauger = func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	f := c.read()
	gauge(agents, float64(f.Agents))
	gauge(records, float64(f.Records))
	gauge(keys, float64(f.Keys))
	gauge(nonces, float64(f.Nonces))
	for kind, n := range f.Alerts {
		gauge(alerts, float64(n), kind)
	}
	for _, b := range f.Backends {
		collectBackend(ch, b, gauge)
	}
}

type gauger func(d *prometheus.Desc, v float64, labels ...string)

func collectBackend(ch chan<- prometheus.Metric, b service.BackendFigures, gauge gauger) {
	count := func(d *prometheus.Desc, v uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), append([]string{b.Name}, labels...)...)
	}
	for _, s := range signer.States() {
		is := 0.0
		if s == b.State {
			is = 1
		}
		gauge(backendState, is, b.Name, string(s))
		count(backendChanges, b.Changes[s], string(s))
	}
	for _, class := range signer.Classes() {
		count(backendFailures, b.Failures[class], string(class))
	}
	if !b.LastSignature.IsZero() {
		gauge(backendLast, float64(b.LastSignature.UnixMicro())/1e6, b.Name)
	}
	count(backendRestarts, b.Restarts)
	gauge(backendWaiting, float64(b.Waiting), b.Name)
	count(backendSigned, b.Direct, "direct")
	count(backendSigned, b.Batches, "batched")
	count(backendMessages, b.Direct, "direct")
	count(backendMessages, b.Batched, "batched")
	count(backendCanaries, b.Canaries-b.CanariesFailed, "ok")
	count(backendCanaries, b.CanariesFailed, "failed")
	if b.CanaryTook > 0 {
		gauge(backendCanary, b.CanaryTook.Seconds(), b.Name)
	}
}
