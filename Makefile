# make engine MODEL=demo            plan, quantize, convert, build, verify, publish
# make plan|data|serve|verify MODEL=...  see README.md
# WEIGHTS=<dir>|synthetic           other weights for the same build

MODEL  ?= demo
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# What people type reaches the shell as a variable, never as a piece of its program.
export CONFIG := configs/$(MODEL).yaml
export WEIGHTS
OVERRIDE := $(if $(WEIGHTS),--weights "$$WEIGHTS")

.PHONY: engine plan data explain serve verify client test test-all lint format venv clean
.DEFAULT_GOAL := help

.PHONY: help
help:
	@sed -n '/^# /!q;s/^# //p' Makefile

venv: $(READY)

# The constraints pin every version that was tested together; pyproject.toml has the ranges.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is missing or older than 3.11; fix: make PYTHON=python3.11 ..." >&2; exit 4; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing pinned requirements into $(VENV) (about 2.2 GB, a few minutes) ..." >&2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	  --editable '.[rtx,triton,mpi,dev]'
	@touch $(READY)

engine: $(READY)
	@$(BIN)/python -m pipeline run "$$CONFIG" $(OVERRIDE)

plan: $(READY)
	@$(BIN)/python -m pipeline plan "$$CONFIG" $(OVERRIDE)

data: $(READY)
	@$(BIN)/python -m pipeline data "$$CONFIG" $(OVERRIDE)

explain: $(READY)
	@$(BIN)/python -m pipeline explain "$$CONFIG" $(OVERRIDE)

serve: $(READY)
	@$(BIN)/python -m pipeline serve "$$CONFIG"

verify: $(READY)
	@$(BIN)/python -m pipeline verify "$$CONFIG"

export PROMPT ?= def main(argv):
client: $(READY)
	@$(BIN)/python -m pipeline client "$$CONFIG" "$$PROMPT" --stream

test: $(READY)
	@OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m "not slow" --strict-skips

test-all: $(READY)
	@OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --strict-skips

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Published engines and the store are results, not rubbish: they stay.
clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
