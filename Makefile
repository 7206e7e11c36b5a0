# Every target works from a fresh checkout: the environment is made on first use and kept until
# pyproject.toml or constraints.txt changes. Choose another interpreter with PYTHON=python3.12.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.everstep-installed
PEERS_BIN := .venv-peers/bin
PEERS_STAMP := .venv-peers/.everstep-installed
PURELIB := import sysconfig; print(sysconfig.get_path("purelib"))
RUNS ?= 3

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench chaos clean

help: ## Show this help
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sort \
		| awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

setup: $(STAMP) ## Make .venv with everything that the other targets need

# The stamp comes last, so that an interrupted installation is taken up again.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP) ## Train through a failure and a return, and check the result
	$(BIN)/everstep demo

test: $(STAMP) ## Run the tests, with a sample of killed workers
	$(BIN)/python -m pytest -q -n auto tests/unit tests/sim tests/store
	$(BIN)/python -m pytest -q tests/gloo tests/chaos

chaos: $(STAMP) ## Kill workers in every phase, cut nodes off, mix twenty faults in a job (minutes)
	$(BIN)/python -m pytest -q -m chaos tests/chaos

check: $(STAMP) ## Check formatting, lint, types and the direction of imports
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

# What everstep's recovery is measured beside. Their environment sees the packages of .venv, so that
# all run on one torch, and keeps their own apart. A peer that cannot be installed is left out.
$(PEERS_STAMP): $(STAMP)
	test -x $(PEERS_BIN)/python || $(BIN)/python -m venv .venv-peers
	$(BIN)/python -c '$(PURELIB)' > "$$($(PEERS_BIN)/python -c '$(PURELIB)')/everstep.pth"
	-$(PEERS_BIN)/python -m pip install -c constraints.txt torchft-nightly==2026.10.26
	-$(PEERS_BIN)/python -m pip install -c constraints.txt nvidia-resiliency-ext==0.4.1
	touch $@

bench: $(STAMP) $(PEERS_STAMP) ## Measure recovery, overhead, scale, resharding, uneven replicas and all-reduces
	$(BIN)/python -m benchmarks.uneven
	$(BIN)/python -m benchmarks.reshard
	$(BIN)/python -m benchmarks.uneven_step
	$(BIN)/python -m benchmarks.gradient_sync
	$(BIN)/python -m benchmarks.recovery --runs $(RUNS)
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.scale
	$(BIN)/python -m benchmarks.all_reduce

clean: ## Remove runs and caches; keeps .venv and .venv-peers
	rm -rf runs build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -path './.venv*' -prune -o -type d -name __pycache__ -exec rm -rf {} +
