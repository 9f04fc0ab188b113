# Every target does its own set-up: on a fresh clone, `make demo` and `make test` are enough.
# Needed beforehand: make, and a Python of at least 3.11 (another than python3: make PYTHON=... demo).

PYTHON ?= python3
# Of the recipes: a config of one's own, and how many processes train the generator.
CONFIG ?=
PROCESSES ?= 2

DEV  := .venv
DEMO := .venv-demo
DOCS := .venv-docs

PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --no-input -c constraints.txt
OFFLINE     := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
PYTEST      := $(OFFLINE) $(DEV)/bin/python -m pytest

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow check fix bench docs clean default-captioner default-generator

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' Makefile

demo: $(DEMO)/.installed ## caption the sample photos, draw a sheet of pictures (base install, no torch)
	@$(DEMO)/bin/diptych caption examples/photos --verbose
	@if [ -f src/diptych/weights/embedded/generator/artifact.json ]; then \
	  rm -f demo/*.png; \
	  $(DEMO)/bin/diptych generate --prompts examples/prompts.txt --seed 1 --output demo \
	    >/dev/null && \
	  $(DEMO)/bin/python examples/edit_pictures.py demo/*.png --out demo/sheet.png >/dev/null && \
	  echo "a photo repainted and stylized, and the lines of examples/prompts.txt drawn:" && \
	  echo "$(CURDIR)/demo/sheet.png"; \
	else \
	  echo "no pictures: this checkout carries no default generator yet" >&2; \
	fi

test: $(DEV)/.installed ## run the tests, offline, and print the coverage
	@OMP_NUM_THREADS=1 $(PYTEST) --numprocesses auto --dist loadfile --no-loadscope-reorder \
	  --cov --cov-report=term

test-slow: $(DEV)/.installed ## run the tests that take minutes, and those that need published weights
	@$(PYTEST) -m '(slow or weights) and not gpu' --timeout 3600

check: $(DEV)/.installed ## lint, format check and strict types; changes nothing
	@$(DEV)/bin/ruff check .
	@$(DEV)/bin/ruff format --check .
	@$(DEV)/bin/mypy

fix: $(DEV)/.installed ## let ruff repair and format what it can
	@$(DEV)/bin/ruff check --fix .
	@$(DEV)/bin/ruff format .

bench: $(DEV)/.installed ## measure speed beside transformers and diffusers
	@$(OFFLINE) $(DEV)/bin/python benchmarks/caption_speed.py
	@$(OFFLINE) $(DEV)/bin/python benchmarks/generate_speed.py

# Both are resumable: stopped and started again, they go on. Data: see the recipes.
# What would ship comes to lie in the folder `shipped` of the config's `output`.
OUTPUT := $(DEV)/bin/python -c 'import sys, tomllib; print(tomllib.load(open(sys.argv[1], "rb"))["output"])'

# CONFIG=shipped: what led to the files that ship; without it, the variant for two processor cores.
CAPTIONER_CONFIG := $(or $(subst shipped,recipes/default_captioner/gpu.toml,$(CONFIG)),recipes/default_captioner/config.toml)
default-captioner: $(DEV)/.installed ## repeat the default captioner's recipe, into runs/ (hours)
	@recipe=recipes/default_captioner; config=$(CAPTIONER_CONFIG); \
	for stage in pretrain tokenizer train refine; do \
	  $(DEV)/bin/python $$recipe/$$stage.py $$config || exit 1; \
	done; \
	$(DEV)/bin/python $$recipe/ship.py $$config "$$($(OUTPUT) $$config)/shipped"

SHIPPED := config gpu more polish finish decoder deeper
GENERATOR_CONFIGS := $(if $(filter shipped,$(CONFIG)),$(SHIPPED:%=recipes/default_generator/%.toml),$(or $(CONFIG),recipes/default_generator/config.toml))
default-generator: $(DEV)/.installed ## repeat the default generator's recipe, into runs/ (hours)
	@export OMP_NUM_THREADS=1; recipe=recipes/default_generator; \
	torchrun="$(DEV)/bin/$(if $(filter 1,$(PROCESSES)),python,torchrun --nproc-per-node $(PROCESSES))"; \
	for config in $(GENERATOR_CONFIGS); do \
	  $$torchrun $$recipe/train_vae.py $$config && \
	  $(DEV)/bin/python $$recipe/tokenizer.py $$config && \
	  $(DEV)/bin/python $$recipe/words.py $$config && \
	  $$torchrun $$recipe/train.py $$config && \
	  $(DEV)/bin/python $$recipe/ship.py $$config "$$($(OUTPUT) $$config)/shipped" && \
	  $$torchrun $$recipe/few_steps.py $$config "$$($(OUTPUT) $$config)/shipped" || exit 1; \
	done

docs: $(DOCS)/.installed ## make the pictures of the guides, build the documentation into site/
	@$(DOCS)/bin/python docs/generate_pictures.py
	@$(DOCS)/bin/python docs/generate_plots.py
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

clean: ## remove build outputs and caches; virtual environments stay
	@rm -rf build dist site demo .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find src tests benchmarks recipes examples -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp per environment: newer than pyproject.toml and constraints.txt means nothing to do.
$(DEV)/.installed: pyproject.toml constraints.txt | $(DEV)/bin/python
	@echo "installing diptych[test] into $(DEV) (takes minutes the first time)" >&2
	@# pip compiles on one core, for a minute; some packages carry files that no compiler reads.
	@$(DEV)/bin/python $(PIP_INSTALL) --no-compile -e '.[test]'
	@$(DEV)/bin/python -m compileall -q -j 0 $(DEV)/lib >/dev/null 2>&1 || true
	@touch $@

$(DEMO)/.installed: pyproject.toml constraints.txt | $(DEMO)/bin/python
	@echo "installing diptych into $(DEMO) (once)" >&2
	@$(DEMO)/bin/python $(PIP_INSTALL) -e .
	@touch $@

$(DOCS)/.installed: pyproject.toml constraints.txt | $(DOCS)/bin/python
	@echo "installing diptych[docs] into $(DOCS) (once)" >&2
	@$(DOCS)/bin/python $(PIP_INSTALL) -e '.[docs]'
	@touch $@

# A half-made environment would look finished, so its python goes when anything fails.
%/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "diptych needs Python 3.11 or newer; '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)" >&2; \
	  echo "name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $* || { \
	  rm -f $@; \
	  echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
.PRECIOUS: %/bin/python
