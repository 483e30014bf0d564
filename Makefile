# make demo   a small GLM's whole life on this machine      make test   the default tests
# Both create .venv and install by themselves. PYTHON picks the interpreter (3.11 or newer).
# PIP_FLAGS is passed to every pip call, e.g. an index that carries CPU-only torch wheels.

PYTHON    ?= python3
PIP_FLAGS ?=
VENV      := .venv
BIN       := $(VENV)/bin

# The doors at the root (model, kernels, ...) must never shadow an installed package of the same name.
export PYTHONSAFEPATH := 1

.PHONY: install demo test check slow soak wheel ci clean

$(VENV)/.run: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(PIP_FLAGS) -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/pip install --quiet $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	touch $@

install: $(VENV)/.dev

demo: $(VENV)/.run
	$(BIN)/glmctl run demo

test: $(VENV)/.dev
	$(BIN)/pytest -n auto

# Everything else that .ci/run asks for.
check: $(VENV)/.dev
	$(BIN)/ruff check glmctl tests benchmarks
	$(BIN)/ruff format --check glmctl tests benchmarks
	$(BIN)/mypy

slow: $(VENV)/.dev
	$(BIN)/pytest -m 'slow or multiprocess' --timeout=900 -rs

# The long forms of what check, test and slow hold in small: hours on two cores.
soak: export GLMCTL_SOAK_REQUESTS = 20000
soak: export GLMCTL_SOAK_KILLS = 200
soak: export GLMCTL_SOAK_SIGNALS = 50
soak: export GLMCTL_SOAK_FAULTS_EVERY = 1
soak: export GLMCTL_SOAK_DAMAGES = 500
soak: export GLMCTL_SOAK_EXAMPLES = 2000
soak: export GLMCTL_SOAK_DEATHS = 20
soak: export GLMCTL_SOAK_LEAVERS = 500
soak: export GLMCTL_SOAK_RL_KILLS = 50
soak: export GLMCTL_SOAK_BOXES = 1000
soak: $(VENV)/.dev
	$(BIN)/pytest --timeout=14400 -m 'slow or not slow' \
		tests/faults/test_checkpoint.py tests/faults/test_durability.py tests/lifecycle/test_resume.py \
		tests/faults/test_serving_soak.py tests/faults/test_serving_death.py tests/faults/test_serving_load.py \
		tests/lifecycle/test_rl_kill.py tests/faults/test_sandbox.py \
		tests/lifecycle/test_schemathesis.py

# The wheel alone, in an empty environment, outside the checkout, runs a whole life.
wheel:
	PYTHON=$(PYTHON) PIP_FLAGS='$(PIP_FLAGS)' bash tests/wheel.sh

ci: check test slow wheel

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
