# Each target does all of its own set-up: a fresh machine needs Python >= 3.11 and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint typecheck format codegen codegen-versions mutation bench docs coverage clean

demo: $(READY)
	$(BIN)/lora-core demo

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# mypy sees the folder mapping of setup.py only in a normal install
typecheck: $(READY)
	rm -rf build/lib build/bdist.* build/typecheck
	$(BIN)/python -m pip install --quiet --no-deps --target build/typecheck .
	cd build/typecheck && ../../$(BIN)/python -m mypy --config-file ../../pyproject.toml -p lora_core

# every configuration of every kernel, compiled for three architectures, or with ARCH=90 for one; needs no GPU
codegen: $(READY)
	$(BIN)/python -m pytest -q -n 2 -m codegen tests/test_codegen.py $(if $(ARCH),-k "readme or (every and $(ARCH))")

# the same by the oldest and the newest Triton that the kernels are written for
codegen-versions: $(READY)
	for version in 3.6.0 3.9.0; do \
		$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/triton-$$version triton==$$version && \
		PYTHONPATH=build/triton-$$version $(BIN)/python -m pytest -q -n 2 -m "codegen or not codegen" -k "not readme" tests/test_codegen.py \
		|| exit 1; \
	done

# planted errors that the tests must see: a sample, or with SAMPLE= all of them
SAMPLE := --sample
mutation: $(READY)
	$(BIN)/python tests/mutation.py $(SAMPLE)

bench: $(READY)
	$(BIN)/python -m benchmarks.run

# the site, with every notebook run from scratch, and its interactive pages tried in Chromium: build/docs/index.html
CHROMIUM := $(or $(LORA_CORE_CHROMIUM),/usr/bin/chromium)
docs: $(READY) $(CHROMIUM)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	rm -rf build/docs
	$(BIN)/python -m sphinx -W --keep-going -b html docs build/docs
	LORA_CORE_CHROMIUM=$(CHROMIUM) $(BIN)/python -m pytest -q -n 2 -m browser tests

/usr/bin/chromium:
	@command -v apt-get > /dev/null || \
		{ echo "make docs tries the pages in Chromium: set LORA_CORE_CHROMIUM to a Chromium or Chrome" >&2; exit 1; }
	apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium > /dev/null

coverage: $(READY)
	$(BIN)/python -m pytest -q --cov=lora_core --cov=quant --cov=kernels --cov-report=term

$(READY): setup.py pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("lora-core needs Python 3.11 or newer, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools wheel torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf build dist .venv *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov
