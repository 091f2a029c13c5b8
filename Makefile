# Each target makes the virtual environment it needs on first use: .venv, about 6.5 GB with torch.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

.PHONY: demo demo-full ablation ablation-retraining ablation-proposals test check format clean

demo: $(INSTALLED)  ## the whole pipeline on a small drawn world
	$(VENV)/bin/python -m jobs.demo demo

demo-full: $(INSTALLED)  ## the same with OICR, DINO and Mask2Former, then the three ablations: hours
	$(VENV)/bin/python -m jobs.demo demo --full
	$(MAKE) ablation ablation-retraining ablation-proposals

ablation: $(INSTALLED)  ## after `make demo`: means over three seeds, and what each kind of prompt is worth
	$(VENV)/bin/python -m jobs.ablation detectors demo

ablation-retraining: $(INSTALLED)  ## after `make demo`: MIST and the detectors trained after it, means over three seeds
	$(VENV)/bin/python -m jobs.ablation retraining demo

ablation-proposals: $(INSTALLED)  ## after `make demo`: what each choice of its proposals is worth
	$(VENV)/bin/python -m jobs.ablation proposals demo

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
