# Everything sets itself up: `make demo` and `make test` are all a newcomer needs.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo serve-demo test test-all bench bench-gpu real-size same-loss lint format docs clean

help:  ## list what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

setup: .venv/ready  ## make .venv with pinned versions

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(shell grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,metrics,judge,serve,test,lint]'
	touch $@

demo: setup  ## train a small model for a few minutes, draw pictures, and see what looking again is worth
	$(BIN)/python train.py +experiment=demo
	$(BIN)/python eval.py checkpoint=outputs/demo +ablations=evidence data.limit=200 pictures=false
	@echo "now open outputs/demo/report.html"

serve-demo: setup  ## serve the model of `make demo`, ask it one question, stop it
	$(BIN)/python examples/serve_demo.py outputs/demo

test: setup  ## run the tests (minutes)
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow"

test-all: setup  ## run all tests, slow ones too
	$(BIN)/python -m pytest -n auto --dist worksteal

test-clients: setup  ## install lmms-eval and VLMEvalKit as documented, compare their answers with those of eval.py (an hour)
	$(BIN)/python -m pytest tests/integrations/clients.py

bench: setup  ## what things cost, in ratios: outputs/bench.json
	$(BIN)/python -m vpt.bench

GPUS ?= 1
bench-gpu: setup  ## training and answering at the published sizes, on GPUS=n: outputs/bench_gpu.json
	$(BIN)/python -m $(if $(filter-out 1,$(GPUS)),torch.distributed.run --nproc-per-node=$(GPUS) -m )vpt.bench.gpu

real-size: setup  ## the life of a project at the published sizes (24 GB of memory, 40 GB of disk)
	$(BIN)/python -m vpt.bench.real_size

REF ?= HEAD
same-loss: setup  ## ten steps of training have the losses of commit REF, to the last bit
	$(BIN)/python tests/helpers/same_loss.py $(REF)

lint: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup  ## build the documentation into site/; a dead link stops it
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean:  ## remove .venv, outputs and site
	rm -rf .venv outputs site
