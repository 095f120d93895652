# Every target makes the virtual environment and installs what it needs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo watch test test-gpu lint bench dashboard check-dashboard prometheusrule packages clean

help:  ## Show what each target does
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.installed-all  ## Train a BadNet, repair, export, serve and attack it; ends with one table and two pictures
	$(BIN)/stripwire demo

watch: $(VENV)/.installed-all  ## Run a server, a monitor, a Prometheus and traffic with an attack in it
	$(BIN)/stripwire watch

test: $(VENV)/.installed-dev  ## Run the tests, on the real tritonserver
	$(BIN)/python -m pytest

test-gpu: $(VENV)/.installed-dev  ## Run the tests that need an NVIDIA GPU
	$(BIN)/python -m pip uninstall --quiet --yes onnxruntime onnxruntime-gpu  # they have the same files
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[gpu]'
	$(BIN)/python -m pytest -m gpu

lint: $(VENV)/.installed-dev  ## Check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy .

bench: $(VENV)/.installed-bench  ## Measure what the guard costs, as a ratio to the bare network
	$(BIN)/python -m benchmarks.speed

dashboard: $(VENV)/.installed-dev  ## Generate the Grafana dashboard
	$(BIN)/python -m deploy.grafana.dashboard

check-dashboard: $(VENV)/.installed-dev  ## Check the dashboard against Grafana's TypeScript types; needs Node.js
	$(BIN)/python -m deploy.grafana.check_schema

prometheusrule: $(VENV)/.installed-dev  ## Write the rules of Prometheus as a manifest for Kubernetes; RUNBOOKS=URL links runbooks
	$(BIN)/python -m deploy.kubernetes.prometheusrule $(if $(RUNBOOKS),--runbooks '$(RUNBOOKS)') $(if $(RULES),--plain '$(RULES)')

PIN = $(BIN)/uv pip compile --universal --python-version 3.10 --generate-hashes --no-annotate --quiet \
	--custom-compile-command 'make packages' --constraint constraints.txt
PACKAGES := deploy/docker/packages

packages: $(VENV)/.installed-dev  ## Pin the packages of the container images, with their hashes
	echo setuptools | $(PIN) - --output-file $(PACKAGES)/build.txt
	$(PIN) pyproject.toml --extra monitor --output-file $(PACKAGES)/monitor.txt
	$(PIN) pyproject.toml --extra embedded --output-file $(PACKAGES)/embedded.txt
	$(PIN) pyproject.toml --extra exporter --extra client --output-file $(PACKAGES)/exporter.txt
	echo cupy-cuda12x | $(PIN) - pyproject.toml --output-file $(PACKAGES)/server-cupy-cuda12x.txt
	echo cupy-cuda13x | $(PIN) - pyproject.toml --output-file $(PACKAGES)/server-cupy-cuda13x.txt

clean:  ## Remove the virtual environment, caches and the demo's output
	rm -rf $(VENV) build dist *.egg-info stripwire-demo .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed-%: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python found, expected python3.11; or say make PYTHON=/path/to/python" >&2; exit 1; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$*]"
	@touch $@
