# make demo    set up, run the main job on a private SoftHSM token and swtpm, show it, clean up
# make test    set up, run every test once with the race detector
# The rest: make help

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS := -s -w -X main.version=$(VERSION)
BIN     := bin
FUZZTIME ?= 10s
AGENTS ?= 1000
HSM_AGENTS ?= 1000
SOAKTIME ?= 10m

export TRUSTD_BIN = $(CURDIR)/$(BIN)
export TRUSTD_PEER_VENV = $(CURDIR)/.cache/peer

.PHONY: help setup setup-peer build demo run test test-long soak bench fuzz lint vuln generate release clean

help: ## show this
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

setup: ## install what is missing from Debian
	@scripts/setup.sh devices

setup-peer:
	@scripts/setup.sh peer

build: ## build trustd (static) and its PKCS#11 plugin into bin/
	@mkdir -p $(BIN)
	CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/trustd ./cmd/trustd
	CGO_ENABLED=1 go build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/trustd-pkcs11 ./plugins/pkcs11

demo: setup build ## run the main job end to end and show it
	@go run ./softhsm-test/demo -bin $(BIN)

run: setup build ## leave a daemon in the foreground to play with
	@go build -o $(BIN)/demo ./softhsm-test/demo
	@$(BIN)/demo -bin $(BIN) -run

test: setup-peer build ## run every test once, with the race detector
	TRUSTD_REQUIRE_HSM=1 go test -race -timeout 20m ./...

test-long: setup-peer build ## bursts, kill -9 under load, fuzzing; without the race detector
	TRUSTD_REQUIRE_HSM=1 TRUSTD_LONG=1 go test -count=1 -timeout 25m -run 'Long' ./...
	@$(MAKE) --no-print-directory fuzz

soak: setup build ## devices fail at random under load, for SOAKTIME (10m); nothing may be lost, wrong, or grow
	CGO_ENABLED=1 go build -o $(BIN)/faulty ./plugins/faulty
	@go run ./softhsm-test/soak -bin $(BIN) -time $(SOAKTIME)

fuzz: ## fuzz every parser for FUZZTIME each
	@scripts/fuzz.sh $(FUZZTIME)

bench: setup build ## print ratios measured in one run, and write bench.json; ROWS=prefix runs a part, AGENTS=n registers more
	@go run ./softhsm-test/bench -bin $(BIN) -rows '$(ROWS)' -agents $(AGENTS) -hsm-agents $(HSM_AGENTS) -out bench.json

lint: ## vet, gofmt, staticcheck
	@test -z "$$(gofmt -l .)" || { echo "gofmt would change:"; gofmt -l .; exit 1; }
	go vet ./...
	CGO_ENABLED=0 go vet ./...
	go tool -modfile=tools/go.mod staticcheck ./...

vuln: ## known vulnerabilities, where the database can be reached
	@go tool -modfile=tools/go.mod govulncheck ./... || echo "govulncheck: no verdict here (its database may be out of reach)"

generate: ## regenerate the plugin protocol and the generated documents
	@scripts/generate.sh

release: ## reproducible binaries, checksums and an SBOM into dist/
	@scripts/release.sh $(VERSION)

clean: ## remove what was built
	rm -rf $(BIN) dist bench.json
