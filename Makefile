# Everything runs in .venv, which the first target that needs it makes. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
UV_VERSION := 0.13.9
ARGS ?=
# Test files run side by side; WORKERS=0 runs them in one process, where a debugger works.
WORKERS ?= 2
.DEFAULT_GOAL := help
.PHONY: help setup run test test-slow test-docker image base-image stack stack-down lint format bench bench-scores bench-quality bench-accuracy bench-gpu bench-variants bench-recovery docs results lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY)  ## make .venv with the pinned packages (the other targets do it by themselves)

# Bytecode is compiled here, once: uv does not by itself, and every step would pay for it at its start.
$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the packages, about 6 GB"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --compile-bytecode -r requirements.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	$(BIN)/python -m compileall -q scop components pipelines
	@touch $@

run: $(READY)  ## run the default pipeline (digits, ResNet-20); ARGS="--set finetune.epochs=5" changes it
	$(BIN)/scop run $(ARGS)

test: $(READY)  ## the fast tests, under 10 minutes on two cores
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow and not docker" $(ARGS)

test-slow: $(READY)  ## the tests that take longer
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m slow $(ARGS)

test-docker: $(READY)  ## the tests in containers; they need a docker engine, and build the image
	$(BIN)/python -m pytest -m docker $(ARGS)

image:  ## build the docker image from BASE (default: debian:bookworm-slim)
	docker/build.sh $(BASE)

base-image:  ## make BASE=scop-base:bookworm by debootstrap, where no registry is reachable (root)
	docker/base.sh

stack: $(READY)  ## start an S3 and an MLflow server here, and print the variables to set
	@docker/stack.sh up

stack-down:  ## stop them
	@docker/stack.sh down

lint: $(READY)  ## ruff, mypy and the layers of the packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(READY)  ## let ruff format and mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## measure speed; JSON goes to tests/benchmarks/results
	$(BIN)/python -m tests.benchmarks $(ARGS)

bench-scores: $(READY)  ## judge scores on ResNet-20, a VGG and ResNet-56 without fine-tuning; hours on two cores
	$(BIN)/python -m tests.benchmarks.scores $(ARGS)

bench-quality: $(READY)  ## how good each source's knockoffs are
	$(BIN)/python -m tests.benchmarks.quality $(ARGS)

bench-accuracy: $(READY)  ## what ResNet-20 loses, three seeds; a night on two cores, in parts: call it again
	$(BIN)/python -m tests.benchmarks.accuracy resnet20 --seeds 3 --minutes 60 $(ARGS)

bench-gpu: $(READY)  ## ResNet-56 and ResNet-50 on a GPU, in parts: call it again until it says that all is done
	$(BIN)/python -m tests.benchmarks.accuracy resnet56 resnet50 --train $(ARGS)

bench-variants: $(READY)  ## residual rules, and SCOP against its controls, shortly fine-tuned; an hour and more
	$(BIN)/python -m tests.benchmarks.variants $(ARGS)

bench-recovery: $(READY)  ## what fine-tuning owes to distillation, averages, rounds and the selection; two hours
	$(BIN)/scop run -f tests/benchmarks/recovery.yaml --out runs/benchmarks $(ARGS)
	$(BIN)/python -m tests.benchmarks.tables add recovery-resnet20 "$$(ls -td runs/benchmarks/recovery-*/ | head -1)" \
	  "make bench-recovery" "CIFAR-10 (JPEG q75)"

docs: $(READY)  ## make docs/configuration.md from the docstrings
	$(BIN)/python -m pipelines.reference

results: $(READY)  ## make docs/results.md from the measured figures
	$(BIN)/python -m tests.benchmarks.tables

lock: $(READY)  ## pin the newest versions that pyproject.toml allows, with hashes
	$(BIN)/uv pip compile pyproject.toml --group dev --universal --python-version 3.11 --generate-hashes \
	  --no-header --no-annotate --no-emit-index-url --upgrade --quiet -o requirements.txt
	$(BIN)/uv pip compile pyproject.toml --constraint requirements.txt --universal --python-version 3.11 \
	  --generate-hashes --no-header --no-annotate --no-emit-index-url --quiet -o docker/requirements.txt
	$(BIN)/uv pip compile docker/tools.in --universal --python-version 3.11 \
	  --generate-hashes --no-header --no-annotate --no-emit-index-url --upgrade --quiet -o docker/tools.txt

clean:  ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
