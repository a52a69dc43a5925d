# make demo       a learned optimizer and AdamW on the same model; saves demo.png
# make test       the whole test suite
# make lint types examples clean
# make compat     the tests that lean on Lightning and torch, with all their versions that are supported
# make third-party  six packages built on Lightning, trained by their defaults and by star; writes docs/third_party.md
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

# Each from an empty folder, as a user would run it, and as the only thing that writes there.
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

# One pip command, so that torch and the package are resolved together. The stamp makes a second call quick; it is the
# last thing written, so that an interrupted installation is taken up again.
$(VENV)/.installed-%: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed, this is " + sys.version)'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install "$(TORCH)" -e ".[$*]"
	@touch $@
