# Two commands are enough: `make check` and `make test`. Each makes .venv where there is none, and installs
# what constraints.txt pins; a second call skips that.

PYTHON      ?= python3
TORCH_INDEX ?=
# worksteal: the slow tests must not wait in line behind one worker while the other has nothing to do.
PYTEST_ARGS ?= -n 2 --dist worksteal
VENV        := .venv
CONSTRAINTS := constraints.txt

BIN        := $(VENV)/bin
PIP        := $(BIN)/python -m pip --disable-pip-version-check install -qq --constraint $(CONSTRAINTS)
TORCH      := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' $(CONSTRAINTS))
# Without --no-deps, TORCH_INDEX would also have to hold the pinned version of everything that torch needs.
PIP_TORCH  := $(PIP) --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
OLD_PYTHON := Python 3.11 or newer is needed; name one: make PYTHON=/path/to/python3.11

.DELETE_ON_ERROR:
.PHONY: help check test test-deepspeed test-transformers-4.55 lint goldens clean

help:
	@echo "make check   check every shipped golden, in fp32 and bf16"
	@echo "make test    run the test suite            PYTEST_ARGS='$(PYTEST_ARGS)'"
	@echo "make test-deepspeed  what needs DeepSpeed, with its extra; not a part of make test"
	@echo "make test-transformers-4.55  the core of the suite under the oldest transformers, in an environment of its own"
	@echo "make lint    ruff and mypy --strict"
	@echo "make goldens record every shipped golden again (REASON=...)"
	@echo "make clean   remove .venv, caches and build outputs"
	@echo "Variables:   PYTHON=$(PYTHON)  TORCH_INDEX=URL (a package index that has the torch build you want)"

check: $(VENV)/.installed-base
	$(BIN)/harness check --all --quick

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# Apart from `test`, and not in .ci/run. In this order: the first compiles the all-reduce (g++ or clang++) that both use.
test-deepspeed: $(VENV)/.installed-deepspeed
	$(BIN)/python -m pytest tests/engines/test_deepspeed.py \
	  'tests/test_docs.py::test_what_a_document_says_can_be_done[docs/findings.md]'

# What depends on transformers most, under the oldest that is supported. Apart from `test`, and not in .ci/run.
CORE := tests/numerics tests/test_store.py tests/test_traces.py tests/engines/test_hf.py tests/engines/test_decoding.py \
  tests/engines/test_placement.py tests/flow/test_recording.py tests/flow/test_running.py tests/test_flow.py

test-transformers-4.55: build/constraints-4.55.txt
	$(MAKE) test VENV=.venv-4.55 CONSTRAINTS=$< PYTEST_ARGS="$(CORE)"

build/constraints-4.55.txt: constraints.txt constraints-4.55.txt
	@mkdir -p build
	@awk -F== 'FNR == NR { own[$$1]; print; next } !($$1 in own)' constraints-4.55.txt constraints.txt > $@

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Every shipped golden again, after a model, a suite or a pinned version changed: make goldens REASON="torch 2.14"
MODELS := bloom-tiny bloom-raw llama-tiny gpt2-tiny
goldens: $(VENV)/.installed-base
	@test -n "$(REASON)" || { echo 'Say why: make goldens REASON="..."' >&2; exit 1; }
	@set -e; for model in $(MODELS); do for suite in prompts/*.toml; do \
	  $(BIN)/harness record --model golden/$$model/model --suite $$suite \
	    --out golden/$$model/$$(basename $$suite .toml) --update --reason "$(REASON)"; done; done

clean:
	rm -rf $(VENV) .venv-4.55 build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find harness tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Each stamp is touched last: an interrupted installation leaves none, and the next call resumes it.

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not found. $(OLD_PYTHON)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is $$($(PYTHON) --version 2>&1). $(OLD_PYTHON)" >&2; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.installed-base: pyproject.toml $(CONSTRAINTS) | $(VENV)/.created
	@echo "Installing $(TORCH) (a few hundred MB or more: this can take minutes)"
	@$(PIP_TORCH)
	@echo "Installing golden-harness and the rest of what it needs, as $(CONSTRAINTS) pins it"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed-base
	@echo "Installing the test extra"
	@$(PIP) --editable '.[test]'
	@touch $@

$(VENV)/.installed-deepspeed: $(VENV)/.installed-test
	@echo "Installing the deepspeed extra"
	@$(PIP) --editable '.[test,deepspeed]'
	@touch $@
