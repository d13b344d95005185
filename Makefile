# Two commands set everything up: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: demo test test-all tables lint types layers clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

install: $(VENV)/.installed

# Checks, explains, trains and scores a flow on real data beside two baselines (a few minutes).
demo: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python benchmarks/demo.py

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow"

test-all: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# The parser's tables, after a change of the grammar.
tables: $(VENV)/.installed
	$(BIN)/python -c "from flowlang.syntax.tables import dump; open('grammar/tables.json', 'w').write(dump())"

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

layers: $(VENV)/.installed
	rm -rf build/layers
	$(BIN)/python -m pip install --quiet --no-deps --target build/layers .
	cd build/layers && PYTHONPATH="$(CURDIR)/build/layers" "$(CURDIR)/$(BIN)/lint-imports" --config "$(CURDIR)/pyproject.toml"

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
