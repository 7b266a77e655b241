# Targets run in .venv, which is created on first use. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=
# Number of processes that run test files in parallel. WORKERS=0 uses one process, for debugging.
WORKERS ?= 2
# Script and style sheet of the results page, without their endings. The files in vendor/ are not ours to format.
PAGE := scop/report/page/page
DENO_FORMAT := --no-config --line-width 120
.DEFAULT_GOAL := help
.PHONY: help setup run test test-slow test-docker image base-image stack stack-down lint format bench bench-scores bench-quality bench-accuracy bench-gpu bench-short bench-recipes bench-variants bench-recovery docs docs-site results lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 17

setup: $(READY)  ## create .venv with the pinned packages (other targets do this when needed)

# Without .ready the environment is missing or incomplete, so it is made anew. pip installs uv by hash; uv does the rest.
# Bytecode is compiled here once, because uv does not do it; otherwise every step would pay for it at its start.
$(READY): requirements.txt docker/tools.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is required: make PYTHON=python3.12 ..."; exit 2; }
	test -e $@ || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing the packages, about 6 GB"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r docker/tools.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --compile-bytecode -r requirements.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	$(BIN)/python -m compileall -q scop components pipelines
	@touch $@

run: $(READY)  ## run the default pipeline (digits, ResNet-20); set options with ARGS="--set finetune.epochs=5"
	$(BIN)/scop run $(ARGS)

test: $(READY)  ## run the fast tests (less than 5 minutes on two cores)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow and not docker" $(ARGS)

test-slow: $(READY)  ## run the slow tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m slow $(ARGS)

test-docker: $(READY)  ## build the image and run the container tests; needs a Docker engine
	$(BIN)/python -m pytest -m docker $(ARGS)

image:  ## build the Docker image from BASE (default: debian:bookworm-slim)
	docker/build.sh $(BASE)

base-image:  ## build a Debian base image with debootstrap, without a registry, and print its name; needs root
	docker/base.sh

stack: $(READY)  ## start a local S3 and MLflow server and print the variables to set
	@docker/stack.sh up

stack-down:  ## stop the servers of `make stack`
	@docker/stack.sh down

lint: $(READY)  ## run ruff, deno (the page's script and style sheet), mypy and the check of import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/deno lint --quiet --no-config $(PAGE).js
	$(BIN)/deno fmt --quiet --check $(DENO_FORMAT) $(PAGE).js $(PAGE).css
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(READY)  ## fix and format the code with ruff and deno
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/deno lint --quiet --no-config --fix $(PAGE).js
	$(BIN)/deno fmt --quiet $(DENO_FORMAT) $(PAGE).js $(PAGE).css

bench: $(READY)  ## run the speed benchmarks; writes JSON to tests/benchmarks/results
	$(BIN)/python -m tests.benchmarks $(ARGS)

bench-scores: $(READY)  ## compare scores on ResNet-20 and a VGG without fine-tuning; hours on two cores
	$(BIN)/python -m tests.benchmarks.scores $(ARGS)

bench-quality: $(READY)  ## measure the quality of each knockoff source
	$(BIN)/python -m tests.benchmarks.quality $(ARGS)

# $(call benchmark,CONFIG,NAME) runs a configuration in runs/benchmarks/NAME, or resumes the run that is there, and stores
# its figures as tests/benchmarks/results/NAME.json. To measure again, delete the folder.
define benchmark
test -e runs/benchmarks/$(2)/*/summary.json || $(BIN)/scop run -f $(1) --out runs/benchmarks/$(2) \
  $(patsubst %/config.yaml,--resume %,$(lastword $(wildcard runs/benchmarks/$(2)/*/config.yaml))) $(ARGS)
$(BIN)/python -m tests.benchmarks.tables add $(2) "$$(dirname runs/benchmarks/$(2)/*/summary.json)" "make $@"
endef

bench-accuracy: $(READY)  ## measure ResNet-20's accuracy after pruning, three seeds; half a day on two cores; repeat to resume
	$(call benchmark,cifar10-resnet20,accuracy-resnet20)

bench-gpu: $(READY)  ## the same for ResNet-56 and ResNet-50 on a GPU; repeat to resume
	$(call benchmark,cifar10-resnet56,accuracy-resnet56)
	$(call benchmark,cifar10-resnet50,accuracy-resnet50)

bench-short: $(READY)  ## the same for ResNet-56 on two cores, with too few epochs; hours; repeat to resume
	$(call benchmark,tests/benchmarks/short.yaml,accuracy-resnet56-short)

bench-recipes: $(READY)  ## measure ResNet-20 with other fine-tuning recipes; a day on two cores; repeat to resume
	$(call benchmark,tests/benchmarks/recipes.yaml,accuracy-resnet20-recipes)

bench-variants: $(READY)  ## compare residual rules, and SCOP with its controls, after short fine-tuning; hours
	$(call benchmark,tests/benchmarks/variants.yaml,variants-resnet20)

bench-recovery: $(READY)  ## measure the effect of distillation, weight averaging, rounds and selection; two hours
	$(call benchmark,tests/benchmarks/recovery.yaml,recovery-resnet20)

docs: $(READY)  ## generate docs/configuration.md from the docstrings
	$(BIN)/python -m pipelines.reference

docs-site: $(READY)  ## build the documentation with the API reference into site/
	$(BIN)/mkdocs build --strict

results: $(READY)  ## insert the measured results into docs/results.md and docs/experiments.md
	$(BIN)/python -m tests.benchmarks.tables

lock: $(READY)  ## pin the newest versions allowed by pyproject.toml, with hashes
	$(BIN)/uv pip compile pyproject.toml --extra all --group dev --universal --python-version 3.11 --generate-hashes \
	  --no-header --no-annotate --no-emit-index-url --upgrade --quiet -o requirements.txt
	$(BIN)/uv pip compile pyproject.toml --extra all --constraint requirements.txt --universal --python-version 3.11 \
	  --generate-hashes --no-header --no-annotate --no-emit-index-url --quiet -o docker/requirements.txt
	$(BIN)/uv pip compile docker/tools.in --universal --python-version 3.11 \
	  --generate-hashes --no-header --no-annotate --no-emit-index-url --upgrade --quiet -o docker/tools.txt

clean:  ## remove .venv and caches; keep runs/
	rm -rf $(VENV) build dist site .mypy_cache .pytest_cache .ruff_cache
