# Needs Python 3.11, 3.12 or 3.13 and make; everything else is installed into .venv at the versions of constraints.txt.

# The first Python that fits; make PYTHON=... to choose.
PYTHON ?= $(shell for candidate in python3 python3.13 python3.12 python3.11 python; do \
	$$candidate -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
	&& echo $$candidate && break; done)
BIN := .venv/bin
INSTALLED := .venv/.complete
PYTEST := $(BIN)/python -m pytest
FAST := not gpu and not slow and not drill

# With small tensors on few cores, more threads only wait for each other. No test uses the network.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
test test-slow test-all test-next test-next-part: export HF_HUB_OFFLINE = 1
test test-slow test-all test-next test-next-part: export WANDB_MODE = offline

.PHONY: help environment quickstart test test-slow test-all test-next test-next-part gpu lint format types audit clean
.DELETE_ON_ERROR:

help:
	@echo "make quickstart   environment, synthetic data, tiny checkpoint, joint training, evaluation, drawings;"
	@echo "                  MODEL=qwen2_vl or qwen3_vl: of another family than qwen2_5_vl"
	@echo "make test         environment, all tests but the slow ones and those that need a GPU"
	@echo "make test-slow    the slow ones"
	@echo "make test-all     everything, the tests of minutes and, if there is a GPU, its own too"
	@echo "make test-next    the fast ones on the newest torch and transformers that work, in .venv-next;"
	@echo "                  make test-next-part: those of them that CI runs"
	@echo "make gpu          measure on the GPU of this machine, in at most 8 minutes"
	@echo "make lint types   ruff, pyright"
	@echo "make audit        known security faults of what is installed, by pip-audit; the index must know them"
	@echo "make format       ruff format and the import order"
	@echo "make clean        remove what was built, but not .venv"

# The family of the quickstart's tiny checkpoint.
MODEL ?= qwen2_5_vl

environment: $(INSTALLED)

# The stamp is written last, so an install that was killed starts again.
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "found no Python 3.11, 3.12 or 3.13: install one, or make PYTHON=/path/to/it"; exit 1; }
	test -e $@ || { rm -rf .venv && $(PYTHON) -m venv .venv; }
	rm -f $@
	@echo "installing into .venv: some minutes, 8 GB"
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev]'
	touch $@

quickstart: $(INSTALLED)
	$(BIN)/python tests/benchmarks/quickstart.py --model $(MODEL)

test: $(INSTALLED)
	$(PYTEST) -n 2 --dist loadfile -m "$(FAST)"

test-slow: $(INSTALLED)
	$(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder -m "slow and not gpu and not drill"

test-all: $(INSTALLED)
	$(PYTEST)

# All pins of constraints.txt, but those that overrides.txt replaces.
.venv-next/.complete: pyproject.toml constraints.txt overrides.txt
	rm -rf .venv-next && $(PYTHON) -m venv .venv-next
	.venv-next/bin/python -m pip install --disable-pip-version-check --quiet -c constraints.txt uv
	sed -n 's/\(.*==\).*/^\1/p' overrides.txt | grep -vf - constraints.txt > .venv-next/constraints.txt
	.venv-next/bin/uv pip install --quiet --python .venv-next/bin/python -c .venv-next/constraints.txt \
		--override overrides.txt -e '.[dev]'
	touch $@

test-next: .venv-next/.complete
	.venv-next/bin/python -m pytest -n 2 --dist loadfile -m "$(FAST)"

# The part of them that CI runs, and two processes: what depends most on the versions.
NEXT_PART := tests/models/test_vlm.py tests/models/test_lora.py tests/test_exactness.py tests/data/test_positions.py \
	tests/data/test_image.py tests/entries/test_export.py tests/checkpoints/test_between_versions.py \
	tests/distributed/test_two_ranks.py::test_other_families

test-next-part: .venv-next/.complete
	.venv-next/bin/python -m pytest -n 2 --dist loadfile $(NEXT_PART)

# Without a package index: tests/gpu/wheels.sh elsewhere, then tests/gpu/run.sh here.
gpu: $(INSTALLED)
	PYTHON=$(BIN)/python tests/gpu/run.sh

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix --select I .
	$(BIN)/ruff format .

types: $(INSTALLED)
	$(BIN)/pyright

# --strict: a package that the index says nothing about is a failure, not a pass.
audit: $(INSTALLED)
	test -x .venv-audit/bin/pip-audit || { $(PYTHON) -m venv .venv-audit && \
		.venv-audit/bin/python -m pip install --disable-pip-version-check --quiet pip-audit==2.10.1; }
	.venv-audit/bin/pip-audit --strict --skip-editable --progress-spinner off \
		--path "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

clean:
	rm -rf build quickstart overfit runs wandb bench *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
