PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
KERNEL := OMP_NUM_THREADS=1 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_MMAP_MAX_=0  # as harmonize run has them

.PHONY: env figures test lint notebooks

env: $(VENV)/installed

$(VENV)/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

figures: env
	$(BIN)/harmonize run

notebooks: env  # execute in place: what is committed shows its outputs
	TQDM_DISABLE=1 $(KERNEL) $(BIN)/jupyter nbconvert --log-level WARN --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False notebooks/*.ipynb

lint: env
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pydoclint harmonize_lib
	$(BIN)/mypy

test: lint
	$(BIN)/harmonize verify
	(echo tests; ls notebooks/*.ipynb) | $(KERNEL) HARMONIZE_FIGURES=$(CURDIR)/$(VENV)/figures xargs -n 1 -P 2 $(BIN)/python -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout 1800
