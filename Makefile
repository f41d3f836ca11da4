# Everything runs in a virtual environment inside the checkout.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install demo test check lint types bench clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP)  ## make the virtual environment with everything needed to develop

# torch comes first and alone, so that pip takes the pinned build and not the newest one that another package asks for.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)  ## fine-tune the shipped model on the shipped data, compare before and after
	$(BIN)/python demo/run.py

lint: $(STAMP)  ## ruff: rules, formatting, complexity
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## mypy, strict, on all of src
	$(BIN)/mypy

# Two processes: most tests keep one core busy, and those on ranks wait for one another.
test: lint types  ## lint, type check and all tests
	$(BIN)/pytest -q -n 2 --dist worksteal

bench: $(STAMP)  ## side by side with peft; writes benchmarks/RESULTS.md
	$(BIN)/python -m benchmarks.run

clean:  ## remove what the targets made
	rm -rf $(VENV) runs build dist
