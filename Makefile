# `make demo` and `make test` are the two commands of the README; `make help` lists the rest.
PYTHON ?= python3
VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin

# torch-sys asks the active virtual environment for libtorch, and PyO3 for the interpreter: both must be this one.
export VIRTUAL_ENV := $(VENV)
export PYO3_PYTHON := $(BIN)/python
export PATH := $(BIN):$(PATH)

# Each takes up to 2 GiB.
WORKERS ?= 2
RUST_FILES = $(shell git ls-files '*.rs')
# Rebuild the extension where it stands; what it depends on is installed already.
MATURIN := maturin develop --release --quiet --skip-install
# Maturin tells PyO3 the interpreter by this name; where clippy did not, each of the two would rebuild what the other has built.
CLIPPY = PYO3_ENVIRONMENT_SIGNATURE=$$(python -c 'import sys; print("%s-%d.%d-%dbit" % (sys.implementation.name, *sys.version_info[:2], sys.maxsize.bit_length() + 1))') cargo clippy --release
# pip and not maturin where extras are wanted: only pip follows an extra that names other extras of the same package.
INSTALL := python -m pip install --quiet --no-build-isolation --editable

.DEFAULT_GOAL := help
.PHONY: help check-tools build demo bench test docs lint lint-rust lint-python test-rust test-python test-slow format clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

check-tools: ## Say which prerequisite is missing
	@command -v cargo >/dev/null || { echo "error: cargo not found. Install the Rust toolchain (1.89 or newer) with rustup or your system's packages." >&2; exit 1; }
	@command -v c++ >/dev/null || { echo "error: c++ not found. Install a C++ compiler, for example g++ or clang." >&2; exit 1; }
	@command -v git >/dev/null || { echo "error: git not found. Install git." >&2; exit 1; }
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found. Install Python 3.10 or newer, or name one: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $(PYTHON) is older than 3.10. Name a newer one: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) has no venv module. Install it (Debian and Ubuntu: python3-venv)." >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' || { echo "error: Python.h not found. Install the headers of $(PYTHON) (Debian and Ubuntu: python3-dev)." >&2; exit 1; }

$(VENV)/.ready: pyproject.toml | check-tools
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "maturin>=1.16,<2" "torch==2.13.*" "numpy>=1.26"
	@touch $@

build: $(VENV)/.ready ## Build the extension in release mode into .venv
	$(INSTALL) .

demo: $(VENV)/.ready ## Train a small ViT dense and with Fibottention on real images; writes runs/demo/report.html
	$(INSTALL) ".[train]"
	sparse-mhsa demo --output-dir runs/demo

bench: $(VENV)/.ready ## Speed and memory of the kernels against the alternatives; a subset with: make bench ARGS=--quick
	$(INSTALL) ".[plot]"
	sparse-mhsa bench kernels --output-dir runs/bench $(ARGS)

test: lint-rust ## Everything that must pass: linters, Rust tests, Python tests
	@# mypy keeps one core busy, and the compiler has work for the other.
	$(MAKE) --jobs 2 --output-sync=target lint-python test-rust
	$(MAKE) test-python

$(VENV)/.test-ready: pyproject.toml | $(VENV)/.ready
	$(INSTALL) ".[test]"
	@touch $@

docs: $(VENV)/.test-ready ## Regenerate the table of masks in README.md and the gallery in docs/
	$(MATURIN)
	python docs/gallery.py

lint: lint-rust lint-python ## rustfmt, clippy, ruff, mypy, stubs, stale documentation

lint-rust: $(VENV)/.test-ready
	rustfmt --check $(RUST_FILES)
	$(CLIPPY) --all-targets --no-default-features -- -D warnings
	$(CLIPPY) --lib -- -D warnings
	$(MATURIN)

# After lint-rust, which builds the extension that stubs are held against; not here, where it would wait for test-rust to compile.
lint-python: $(VENV)/.test-ready
	ruff check .
	ruff format --check .
	mypy
	python -m mypy.stubtest sparse_mhsa._core
	python docs/gallery.py --check

test-rust: ## Patterns, plans and kernels, without torch
	cargo test --release --no-default-features --lib

test-python: $(VENV)/.test-ready ## The Python suite, by two processes (another number: WORKERS=1)
	$(MATURIN)
	pytest --numprocesses $(WORKERS) --dist worksteal

test-slow: $(VENV)/.test-ready ## What takes minutes: compiling with inductor, the accuracy bench
	$(MATURIN)
	pytest -m slow

format: $(VENV)/.test-ready ## Format everything
	rustfmt $(RUST_FILES)
	ruff check --fix .
	ruff format .

clean: ## Remove what was built
	rm -rf target runs dist $(VENV)
