PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: train test lint lock clean

train: $(VENV)/.installed ## train the bundled model with recipes/tiny_cpu.yaml
	$(PY) -m hapo_lite.train recipes/tiny_cpu.yaml

test: $(VENV)/.installed-dev ## run the test suite
	$(PY) -m pytest

lint: $(VENV)/.installed-dev ## check style
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

lock: requirements.txt | $(VENV)/bin/python ## write requirements.lock anew, with the hash of every file
	$(PY) .ci/lock.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(VENV)/bin/python
	$(PY) -m pip install -q -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(PY) -m pip install -q -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV)
