# Two commands from a fresh machine: `make quickstart` and `make test`. `make help` lists the rest.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: help setup quickstart test test-slow drill bench check format docs clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.ready  ## the virtual environment .venv, from pinned constraints

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vqscale needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# An S3 server for the tests, which nothing else needs.
$(VENV)/.ready-test: $(VENV)/.ready
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

# Peers of the benchmarks, and what draws their pictures. litdata brings a torchvision, which does not load beside the
# CPU's build of torch; torchmetrics would try, so that one that does not load is taken out again. litdata runs without.
$(VENV)/.ready-bench: $(VENV)/.ready
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -c 'import torchvision' 2>/dev/null || $(BIN)/pip uninstall --quiet --yes torchvision
	touch $@

quickstart: setup  ## clock faces to sampled clocks on this machine, in about nine minutes
	$(BIN)/vqscale quickstart

# Two at a time: most tests start processes, and wait for them longer than they compute. A file stays in one process,
# since its tests share what they have trained.
test: $(VENV)/.ready-test  ## everything that takes less than a minute a test
	$(BIN)/pytest -m 'not slow' -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.ready-test  ## the long tests: the whole quickstart with its promised figures
	$(BIN)/pytest -m slow --timeout 1800

bench: $(VENV)/.ready-bench  ## throughput against peers and floors, with plots and a page, written to out/bench
	$(BIN)/vqscale bench

drill: setup  ## kills at random moments and compares: 52 in training, 20 in extraction; about half an hour
	$(BIN)/vqscale submit drill --stages generate,pack,tokenizer,extract --follow && \
	for strategy in ddp fsdp2; do for stage in tokenizer prior; do \
		$(BIN)/vqscale drill latest --stage $$stage --random 13 resources.strategy=$$strategy || exit 1; \
	done; done && $(BIN)/vqscale drill latest --stage extract --random 20

check: setup  ## linters and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup  ## write docs/recipes.md and docs/profiles.md from the types of recipe and profile
	$(BIN)/python docs/make_recipes.py
	$(BIN)/python docs/make_profiles.py

clean:  ## remove the environment and caches; runs and data stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache build *.egg-info
