# Everything runs in .venv. `make setup` first, or any other target: they all set up what is missing.
#   make setup TORCH_INDEX=URL   take torch from another package index (a CUDA, ROCm or CPU build)
#   make reproduce CORES=4 CONFIG="results=DIR data=DIR"   any of Snakemake's --config settings

PYTHON ?= $(shell for name in python3.11 python3 python3.12 python3.13 python3.14; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)
CORES ?= 2
WORKERS ?= 2
EXPERIMENT ?= tiny
RESULTS ?= results
BIN := .venv/bin
LOCK := envs/requirements.lock
CHECKS := envs/checks.lock
# named after what it installs: another lock or another list of dependencies sets up again, anything else is a no-op
STAMP := .venv/.setup-$(shell cat $(LOCK) $(CHECKS) pyproject.toml | cksum | tr ' ' '-')
TORCH := $(shell grep '^torch==' $(LOCK))

.DEFAULT_GOAL := help
.PHONY: help setup lint test reproduce publish test-slurm benchmarks

# another torch build than the one installed: set up again
ifdef TORCH_INDEX
ifneq ($(TORCH_INDEX),$(shell cat .venv/.torch-index 2>/dev/null))
.PHONY: $(STAMP)
endif
endif

help:
	@echo "make setup        create .venv with the locked packages and this project (TORCH_INDEX=URL: another torch build)"
	@echo "make lint         ruff (format and rules) and mypy"
	@echo "make test         every test but those that start a Slurm; GPU tests are skipped where there is no card"
	@echo "make reproduce    run the experiment tiny from nothing to tables, figures and verdicts (CORES=$(CORES))"
	@echo "make publish EXPERIMENT=NAME   copy the tables and figures of results/NAME to results/published/NAME"
	@echo "make test-slurm   the workflow on a one-node Slurm started on this machine (needs root)"
	@echo "make benchmarks   the kill test and the overhead of the harness (about an hour)"

setup: $(STAMP)
	@echo "The environment .venv is ready."

$(STAMP):
	@test -n "$(PYTHON)" || { echo "Assay needs Python 3.11 or newer; say which with make setup PYTHON=/path/to/python." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { \
		echo "$(PYTHON) cannot create environments; on Debian and Ubuntu install the package python3-venv." >&2; exit 1; }
	rm -f .venv/.setup-*
ifdef TORCH_INDEX
	$(BIN)/python -m pip install --disable-pip-version-check --force-reinstall --no-deps --index-url "$(TORCH_INDEX)" "$(TORCH)"
	$(BIN)/python -m pip install --disable-pip-version-check --extra-index-url "$(TORCH_INDEX)" -r $(LOCK)
	printf '%s\n' "$(TORCH_INDEX)" > .venv/.torch-index
else
	$(BIN)/python -m pip install --disable-pip-version-check -r $(LOCK)
endif
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -r $(CHECKS)
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slurm" $(PYTEST)

reproduce: $(STAMP)
	$(BIN)/snakemake --cores $(CORES) --config experiment=$(EXPERIMENT) results=$(RESULTS) $(CONFIG)

publish: $(STAMP)
	@case "$(EXPERIMENT)" in ""|*[!a-z0-9_]*) echo "An experiment's name has small letters, digits and _ only." >&2; exit 1;; esac
	@test -f "$(RESULTS)/$(EXPERIMENT)/results.csv" || { \
		echo "$(RESULTS)/$(EXPERIMENT) has no results.csv: run make reproduce EXPERIMENT=$(EXPERIMENT) first." >&2; exit 1; }
	@! grep -q '"scale": *"smoke"' "$(RESULTS)/$(EXPERIMENT)/experiment.json" || { \
		echo "$(RESULTS)/$(EXPERIMENT) was run at scale=smoke, which measures nothing worth publishing." >&2; exit 1; }
	rm -rf results/published/$(EXPERIMENT)
	mkdir -p results/published
	cp -R "$(RESULTS)/$(EXPERIMENT)" results/published/$(EXPERIMENT)
	find results/published/$(EXPERIMENT) -name "*.csv" -size +2048k -exec gzip -9n {} +
	@echo "results/published/$(EXPERIMENT) holds what the run drew; look at it before committing it."

test-slurm: $(STAMP)
	timeout -k 30 1800 $(BIN)/python -m pytest -m slurm $(PYTEST)

benchmarks: $(STAMP)
	$(BIN)/python tests/benchmarks/overhead.py
	$(BIN)/python tests/benchmarks/kill.py
