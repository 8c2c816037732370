PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup test check demo

setup: .venv/ready

# torch first and pinned: the plain name would pull the CUDA build.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e ".[dev,gguf]"
	touch .venv/ready

test check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q

demo: setup
	$(BIN)/ctxprune run demo --out runs/demo
