# Each target makes the virtual environment it needs on first use: .venv, about 6.5 GB with torch.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

.PHONY: demo demo-full ablation ablation-proposals test test-long test-all check format clean

demo: $(INSTALLED)  ## the whole pipeline on a small drawn world
	$(VENV)/bin/python -m jobs.demo demo

demo-full: $(INSTALLED)  ## the same with every detector, and what each choice is worth: one seed, an hour or two
	$(VENV)/bin/python -m jobs.demo demo --full
	$(MAKE) ablation-proposals

ablation: $(INSTALLED)  ## after `make demo`: the tables of detectors as means over three seeds
	$(VENV)/bin/python -m jobs.ablation detectors demo

ablation-proposals: $(INSTALLED)  ## after `make demo`: what each choice of its proposals is worth
	$(VENV)/bin/python -m jobs.ablation proposals demo

# Two processes share the tests: much of a test is waiting for processes to start. A module's tests stay together.
PYTEST := $(VENV)/bin/python -m pytest -n 2 --dist loadscope

test: $(INSTALLED)  ## every quick test that needs no GPU
	$(PYTEST) -m "not slow"

test-long: $(INSTALLED)  ## the tests of half a minute and more: whole runs, what is killed in them, faults of an object store
	$(PYTEST) -m slow

test-all: test test-long  ## both

check: $(INSTALLED)  ## formatting, lint and types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright

format: $(INSTALLED)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable '.[dev]' --constraint constraints.txt
	touch $@

clean:
	rm -rf $(VENV) demo
