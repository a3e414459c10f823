# The only commands a person has to know. `make` lists them.
PROFILE ?= cpu
PARAMS ?=
PYTHON ?= python3
SOAK_MINUTES ?= 10
PROCESSES ?= 5
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := build/venv
BIN := $(VENV)/bin
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
RUNS := $(NOTEBOOKS:notebooks/%.ipynb=build/$(PROFILE)/notebooks/%.ipynb)
run = build/$(PROFILE)/notebooks/$(1).ipynb

# absolute, because a notebook's kernel may run in another folder
export SPECDEC_BUILD ?= $(CURDIR)/build
# kernels that torch compiles are kept, so that only the first run pays for them
export TORCHINDUCTOR_CACHE_DIR := $(CURDIR)/build/inductor
export TOKENIZERS_PARALLELISM := false
export PYDEVD_DISABLE_FILE_VALIDATION := 1

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' Makefile

$(VENV)/.done: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "specdec needs Python 3.11 or newer; name one with make PYTHON=python3.11"; exit 2; }
	rm -f $@
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

.PHONY: env
env: $(VENV)/.done ## the environment alone, in build/venv (2 min)

.PHONY: reproduce
reproduce: $(RUNS) build/$(PROFILE)/proved ## train, run every notebook, write results/ and the README's numbers (35 min)
ifeq ($(PROFILE),cpu)
	@$(BIN)/python -m specdec.readme
endif

# What each notebook needs before it: the models of 02, and for 07 the benchmark of 06.
GROUND := $(addprefix specdec/,__init__.py theory.py sampling.py data.py model.py checkpoint.py profiles.py train.py report.py)
ENGINE := $(GROUND) $(addprefix specdec/,native.py native.cpp passes.py compiled.py cuda.py native.cu sampling.cu draft.cu inference.py drafting.py engine.py prediction.py bench.py)
$(call run,01_data): $(addprefix specdec/,data.py profiles.py report.py)
$(call run,02_model_and_training): $(GROUND) $(call run,01_data)
$(call run,03_speculative_decoding): $(ENGINE) $(call run,02_model_and_training)
$(call run,04_losslessness): $(ENGINE) $(call run,02_model_and_training) build/$(PROFILE)/proved
$(call run,05_kv_cache_rollback): $(ENGINE) $(call run,02_model_and_training)
$(call run,06_benchmark): $(ENGINE) $(addprefix specdec/,distill.py roofline.py reproduce.py) $(call run,02_model_and_training)
$(call run,07_distillation): $(ENGINE) $(addprefix specdec/,distill.py reproduce.py) $(call run,06_benchmark)

# Other PARAMS than last time make another report.
build/$(PROFILE)/params: FORCE
	@mkdir -p $(@D)
	@echo '$(PARAMS)' | cmp -s - $@ || echo '$(PARAMS)' > $@
.PHONY: FORCE
FORCE:

# Notebooks measure, so they never run side by side.
.NOTPARALLEL:
build/$(PROFILE)/notebooks/%.ipynb: notebooks/%.ipynb build/$(PROFILE)/params | $(VENV)/.done
	@mkdir -p $(@D)
	@echo "$* ($(PROFILE))"
	@$(BIN)/python -m specdec.notebooks run $< $@ profile=$(PROFILE) $(PARAMS)

# What proves that nothing is lost, once more with the trained pair.
PROOF := $(addprefix tests/test_,lossless.py statistics.py edges.py sampling.py engine.py soak.py)
.PHONY: proof
proof: $(VENV)/.done ## every check and every deliberate mistake of losslessness as a table in results/ (6 min)
	SPECDEC_PROFILE=$(PROFILE) $(BIN)/python -m pytest $(PROOF) --record-proof
ifeq ($(PROFILE),cpu)
	@$(BIN)/python -m specdec.readme
endif

build/$(PROFILE)/proved: $(ENGINE) $(wildcard tests/*.py) $(call run,02_model_and_training)
	@$(MAKE) --no-print-directory proof
	@touch $@

.PHONY: roofline
roofline: $(VENV)/.done ## a step of every model beside the floor that memory sets, the seed's sizes too (1 min)
	$(BIN)/python -m specdec bench --profile $(PROFILE) --roofline
ifeq ($(PROFILE),cpu)
	@$(BIN)/python -m specdec.readme
endif

.PHONY: soak
soak: $(VENV)/.done ## the same on random models, laws and settings, SOAK_MINUTES=10 (10 min)
	$(BIN)/python tests/soak.py --minutes $(SOAK_MINUTES)

.PHONY: distill
distill: $(VENV)/.done ## what a draft may learn from: every loss and text compared, into results/ (30 min)
	$(BIN)/python -m specdec distill --profile $(PROFILE)

.PHONY: batches
batches: $(VENV)/.done ## what it is worth to a draft that it read its target's batches, into results/ (10 min)
	$(BIN)/python -m specdec distill --profile $(PROFILE) --batches

.PHONY: peers
peers: $(VENV)/.done ## transformers on the same weights, in turns with ours, into results/ (15 min)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -e '.[peers]' -c requirements.lock
	$(BIN)/python -m specdec bench --profile $(PROFILE) --peers --draft distilled --prompts 8

.PHONY: runs
runs: $(VENV)/.done ## the headline's speed-ups once more, by PROCESSES=5 one after another, into results/ (10 min)
	for run in $$(seq $(PROCESSES)); do $(BIN)/python -m specdec bench --profile $(PROFILE) --again; done
ifeq ($(PROFILE),cpu)
	@$(BIN)/python -m specdec.readme
endif

MINUTES ?= 25
DATA ?=
.PHONY: seed-gpu
seed-gpu: $(VENV)/.done ## the seed's sizes on one GPU, unattended, in MINUTES=25; DATA=text:PATH for local text (25 min)
	$(BIN)/python -m specdec reproduce --profile seed --minutes $(MINUTES) $(if $(DATA),--data "$(DATA)")

# side by side, on one core each: nearly all of it is too small for two
.PHONY: test
test: $(VENV)/.done ## the tests and every notebook in the ci profile (7 min)
	@export OMP_NUM_THREADS=1; $(MAKE) test-notebooks > build/test-other.log 2>&1 & other=$$!; code=0; \
	OMP_NUM_THREADS=1 $(MAKE) test-code || code=$$?; \
	wait $$other || code=$$?; cat build/test-other.log; exit $$code

.PHONY: test-code test-notebooks
test-code:
	$(BIN)/python -m pytest tests --durations=5
test-notebooks:
	SPECDEC_PROFILE=ci SPECDEC_BUILD=$(CURDIR)/build/test SPECDEC_RESULTS=$(CURDIR)/build/test/results \
	  $(BIN)/python -m pytest --nbval-lax --nbval-cell-timeout=600 notebooks

.PHONY: refresh
refresh: $(VENV)/.done ## put the outputs of the last `make reproduce` into notebooks/
	$(BIN)/python -m specdec.notebooks refresh build/$(PROFILE)/notebooks notebooks

.PHONY: html
html: $(VENV)/.done ## the executed notebooks as pages with an index, in build/cpu/html
	@mkdir -p build/$(PROFILE)/html
	$(BIN)/jupyter nbconvert --log-level WARN --to html --output-dir build/$(PROFILE)/html build/$(PROFILE)/notebooks/*.ipynb
	$(BIN)/python -m specdec.notebooks index build/$(PROFILE)/html

.PHONY: lab
lab: $(VENV)/.done ## JupyterLab on the notebooks
	$(BIN)/jupyter lab notebooks

.PHONY: clean
clean: ## remove everything that can be made again
	rm -rf build
