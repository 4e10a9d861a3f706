# Each target does its own set-up; all it takes is Python 3.11 to 3.14 and make.
# pip is quiet and takes its usual settings (PIP_INDEX_URL, PIP_FIND_LINKS, ...) from the environment.

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
CORE := $(VENV)/.installed-core
TEST := $(VENV)/.installed-test
# The compilers for GPUs and TPUs, which tests of programs for absent devices need, are an environment of their own.
ACCELERATORS_VENV := .venv-accelerators
ACCELERATORS := $(ACCELERATORS_VENV)/.installed

# What `make demo` passes to `datencoder`, and how many processes the tests run in.
DEMO = personalize examples/robot.png --out out/demo
WORKERS = 2
# The methods of the README's table.
TABLE = base datencoder@0+4+12+50+300 dreambooth lora para disendiff custom_diffusion infusion perfusion \
    textual_inversion e4t:encoder=runs/toyworld/e4t_out@0+4+12+50+300

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo table test test-slow test-accelerators test-accelerators-all lint format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-22s %s\n", $$1, $$2 }' Makefile

demo: $(CORE)  ## personalize on an example picture and generate with it; pictures in out/demo
	$(BIN)/datencoder $(DEMO)

table: $(CORE)  ## measure all methods on the embedded world at the shipped learning rates, as the README's table; hours
	$(BIN)/datencoder pretrain --config configs/toyworld_e4t.py --workdir runs/toyworld/e4t --cpu-devices 2
	$(BIN)/datencoder evaluate --suite toyworld --rates docs/benchmark/rates.json --steps 4,12,50,300 --jobs 2 \
	    --out out/table --methods $(TABLE)

test: $(TEST)  ## run the tests, but for those marked slow
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $(ARGS)

test-slow: $(TEST)  ## run the tests marked slow
	$(BIN)/python -m pytest -m slow $(ARGS)

test-accelerators: $(ACCELERATORS)  ## compile the programs for GPUs and TPUs, which need not be there
	DATENCODER_ACCELERATORS=1 $(ACCELERATORS_VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" tests/accelerators $(ARGS)

test-accelerators-all: $(ACCELERATORS)  ## the same with Stable Diffusion 2.1 and XL; hours
	DATENCODER_ACCELERATORS=1 $(ACCELERATORS_VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal tests/accelerators $(ARGS)

lint: $(TEST)  ## check style, formatting, types and the order of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(TEST)  ## format the code and fix what can be fixed without thought
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## remove build products and caches, and set up afresh next time; out/ and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .ruff_cache .import_linter_cache $(CORE) $(TEST) $(ACCELERATORS)
	find . -name '$(VENV)*' -prune -o -name __pycache__ -type d -exec rm -rf {} +

# pip is the last thing `venv` puts in place: without it an attempt was cut short and is made again.
$(VENV)/bin/pip $(ACCELERATORS_VENV)/bin/pip:
	@for python in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	    if $$python -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null; then \
	        echo "setting up $(@D:/bin=) with $$($$python --version)"; \
	        exec $$python -m venv $(@D:/bin=); \
	    fi; \
	done; \
	echo "No Python from 3.11 to 3.14 with its venv module is on the PATH: install one (Debian, Ubuntu: python3 and python3-venv)." >&2; \
	exit 1

$(CORE): setup.cfg pyproject.toml | $(BIN)/pip
	@echo "installing datencoder_jax into $(VENV); the first time takes a few minutes"
	@$(PIP) install -e .
	@touch $@

$(TEST): setup.cfg pyproject.toml | $(BIN)/pip
	@echo "installing datencoder_jax and its test tools into $(VENV); the first time takes several minutes"
	@$(PIP) install -e '.[test]'
	@$(PIP) install --no-deps 'open_clip_torch == 3.3.*'
	@touch $@ $(CORE)

$(ACCELERATORS): setup.cfg pyproject.toml | $(ACCELERATORS_VENV)/bin/pip
	@echo "installing datencoder_jax and the compilers for GPUs and TPUs into $(ACCELERATORS_VENV); 4 GB, a few minutes"
	@$(ACCELERATORS_VENV)/bin/python -m pip --disable-pip-version-check --quiet install -e '.[accelerators]'
	@touch $@
