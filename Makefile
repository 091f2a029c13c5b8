# Each target makes the virtual environment it needs on first use: .venv, about 6.5 GB with torch.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

.PHONY: demo ablation test check format clean

demo: $(INSTALLED)  ## the whole pipeline on a small drawn world, minutes on a laptop
	$(VENV)/bin/python -m jobs.demo demo

ablation: $(INSTALLED)  ## what each choice of the demo's proposals is worth, after `make demo`
	$(VENV)/bin/python -m jobs.ablation demo

test: $(INSTALLED)  ## every test that needs no GPU
	$(VENV)/bin/python -m pytest

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
