package daemon

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/trustd/trustd/internal/service"
)

// newMetrics returns the registry that /metrics shows: the Go run time, the process, and what the service holds.
func newMetrics(s *service.Service) *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	gauge := func(name, help string, value func(service.Figures) float64) {
		r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: "trustd", Name: name, Help: help},
			func() float64 { return value(s.Figures()) }))
	}
	gauge("agents", "Agents, operators and nodes in the registry, whatever their status.", func(f service.Figures) float64 { return f.Agents })
	gauge("registry_records", "Records in the registry.", func(f service.Figures) float64 { return f.Records })
	gauge("keys", "Keys that this host holds.", func(f service.Figures) float64 { return f.Keys })
	gauge("nonces", "Spent nonces that are kept.", func(f service.Figures) float64 { return f.Nonces })
	return r
}
