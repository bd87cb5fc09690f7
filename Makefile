# make demo   trains a small language model through the library (CPU or GPU)
# make serve  serves that model over HTTP (trains it first where there is none)
# make test   linters, type checker, tests
# All make their own virtual environment first; they need Python >= 3.12 and nothing else.
#
# CUDA=1       installs JAX with CUDA 13, for a machine with an NVIDIA GPU
# JAX=0.11.2   takes that release of JAX, in a virtual environment of its own
# ARGS="..."   goes to the demo (make demo ARGS="--steps 1000"), the server or pytest

VENV := .venv$(if $(JAX),-jax-$(JAX))$(if $(CUDA),-cuda)
BIN := $(VENV)/bin
comma := ,
EXTRAS := demo$(if $(CUDA),$(comma)cuda)
WORKERS ?= 2
MODEL ?= demo_output/model.safetensors

.DEFAULT_GOAL := help
.PHONY: help demo serve test lint docs clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.installed-demo
	$(BIN)/python examples/train_byte_lm.py $(ARGS)

serve: $(VENV)/.installed-demo
	test -e $(MODEL) || $(BIN)/python examples/train_byte_lm.py --save $(MODEL)
	$(BIN)/python examples/serve.py --model $(MODEL) $(ARGS)

# On a CPU, XLA's programs run once or twice each: optimising them takes longer than running them.
test: lint
	$(if $(CUDA),,JAX_DISABLE_MOST_OPTIMIZATIONS=1) $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-cache --no-logo

docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --strict

$(VENV)/.made:
	@python=$$(tools/find_python.sh) && echo "Making $(VENV) with $$python" && "$$python" -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	@touch $@

# A stamp's name says what was installed; a changed pyproject.toml installs again.
$(VENV)/.installed-demo: pyproject.toml | $(VENV)/.made
	@echo "Installing the project and what the demo needs into $(VENV)"
	@$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]' $(if $(JAX),'jax==$(JAX)')
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/.made
	@echo "Installing the project and what the tests need into $(VENV)"
	@$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]' --group test $(if $(JAX),'jax==$(JAX)')
	@touch $@ $(VENV)/.installed-demo

$(VENV)/.installed-docs: pyproject.toml | $(VENV)/.made
	@echo "Installing the project and what the documentation needs into $(VENV)"
	@$(BIN)/python -m pip install --quiet --editable '.[docs]' $(if $(JAX),'jax==$(JAX)')
	@touch $@

clean:
	rm -rf .venv .venv-* build dist site demo_output
