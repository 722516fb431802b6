# Every target does its own set-up (.ci/setup): on a fresh Debian 12, as root or with sudo, `make demo` is enough.

BIN := .venv/bin
ROUNDS ?= 5
SECONDS ?= 60
SIZE ?= 1024
MINUTES ?= 30
ARGS ?=
PREFIX ?= /usr/local
DESTDIR ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format bench mutants soak fuzz lock install uninstall clean

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Install the Debian packages and the virtual environment that the others need.
	@.ci/setup

demo: setup ## Load two models while they download: about two minutes, live.
	@$(BIN)/python tests/demo/demo.py $(ARGS)

test: setup ## Run all the tests. ARGS='tests/core -k planner' runs some.
ifeq ($(strip $(ARGS)),)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile tests/core --cov=weightfs.core --cov-branch --cov-report=term-missing:skip-covered --cov-fail-under=100
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --ignore=tests/core
else
	$(BIN)/python -m pytest $(ARGS)
endif

lint: setup ## Style, types and the rules of import between layers.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## Let ruff format and sort what it can.
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

bench: ## Measure beside curl, aria2 and rclone into build/bench.{txt,json}. ROUNDS=1 SIZE=256 (MiB) for a quick look.
	@.ci/setup bench
	@$(BIN)/python tests/bench/bench.py --rounds $(ROUNDS) --size $(SIZE) $(ARGS)

mutants: setup ## Take out each defence against a known fault in turn: its tests have to fail. ARGS='8 redirect' for some.
	$(BIN)/python tests/faults/mutants.py $(ARGS)

soak: setup ## Half an hour of bad weather (MINUTES=30), then the model, property and crash tests for long.
	$(BIN)/python tests/soak/soak.py --minutes $(MINUTES) --report build/soak
	WEIGHTFS_SOAK=1 $(BIN)/python -m pytest -q --timeout=0 --hypothesis-profile=soak tests/core tests/model tests/faults tests/systemd tests/control/test_openapi.py
	$(BIN)/python tests/faults/mutants.py

fuzz: setup ## Fuzz every parser of strangers' bytes with atheris, SECONDS=60 each (docs/security.md).
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-input --require-hashes --no-deps --only-binary :all: \
	  --upgrade --target build/atheris -r .lock/fuzz.txt
	@PYTHONPATH=build/atheris $(BIN)/python tests/fuzz/fuzz.py --seconds $(SECONDS) $(ARGS)

lock: setup ## Resolve the dependencies of pyproject.toml again into .lock/.
	$(BIN)/uv pip compile -q --universal --no-strip-extras --generate-hashes --python-version 3.11 pyproject.toml -o .lock/run.txt
	$(BIN)/uv pip compile -q --universal --no-strip-extras --generate-hashes --python-version 3.11 --group dev pyproject.toml -o .lock/dev.txt
	$(BIN)/uv pip compile -q --universal --no-strip-extras --generate-hashes --python-version 3.11 --group pyproject.toml:build \
	  -c .lock/dev.txt -o .lock/build.txt
	$(BIN)/uv pip compile -q --universal --generate-hashes --python-version 3.11 --group pyproject.toml:fuzz -o .lock/fuzz.txt

install: ## Install weightfs and its systemd units. PREFIX=/usr/local, DESTDIR=, PYTHON=/usr/bin/python3. See docs/systemd.md.
	@PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' systemd/install.sh install

uninstall: ## Remove what `make install` has put there (same PREFIX and DESTDIR), and nothing else.
	@PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' systemd/install.sh uninstall

clean: ## Remove everything that was built, the virtual environment too.
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
