# make demo       train the same model with a learned optimizer and with AdamW; saves demo.png
# make test       run the whole test suite
# make lint, types, examples, clean
# make compat     run the tests that depend on Lightning and torch with every supported version of them
# make third-party  compare star with the default optimizers of six packages built on Lightning
#
# Needs Python >= 3.10, git and make. Variables: PYTHON, VENV, TORCH (e.g. TORCH="torch>=2.4"), JOBS, PYTEST_ARGS.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
JOBS ?= 2
PYTEST_ARGS ?=
BIN := $(VENV)/bin

.PHONY: demo test lint types examples compat third-party clean

demo: $(VENV)/.installed-demo
	MPLBACKEND=Agg $(BIN)/python examples/quickstart.py

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(JOBS) $(PYTEST_ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.installed-test
	$(BIN)/mypy

# Runs each example from its own empty folder, as a user would.
examples: $(VENV)/.installed-test
	@set -e; root="$$PWD"; for example in examples/*.py; do \
		test -e "$$example" || continue; \
		echo "== $$example"; folder="$$(mktemp -d)"; \
		(cd "$$folder" && PATH="$(abspath $(BIN)):$$PATH" python "$$root/$$example"); \
		rm -rf "$$folder"; \
	done

compat:
	bash .ci/compat $(COMBINATIONS)

third-party:
	$(PYTHON) examples/third_party/run.py

clean:
	rm -rf "$(VENV)" .venv-third-party-* build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# One pip command, so torch and the package are resolved together. The stamp makes a second call quick. It is written
# last, so an interrupted installation is repeated.
$(VENV)/.installed-%: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed, this is " + sys.version)'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install "$(TORCH)" -e ".[$*]"
	@touch $@
