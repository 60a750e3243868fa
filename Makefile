# make results DATA_DIR=...   environment, data, quantization sweep, figures, README tables
# make test                   environment and tests
# FORCE=1 measures rows again that are there already.
PYTHON ?= python3
VENV ?= .venv
DATA_DIR ?= data
PY = $(VENV)/bin/python
CHECKPOINTS = $(filter-out %-synthetic/best.pth, $(wildcard checkpoints/*/best.pth))

.PHONY: results test

results: $(VENV)/run
	$(PY) quantize.py --checkpoint $(CHECKPOINTS) --data-dir $(DATA_DIR) $(if $(FORCE),--force)
	$(PY) plots.py --readme

test: $(VENV)/dev
	$(PY) -m pytest --numprocesses 2

$(VENV)/run: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

$(VENV)/dev: requirements-dev.txt $(VENV)/run
	$(PY) -m pip install --quiet --disable-pip-version-check -r $<
	touch $@
