# All set-up on a machine with git, make and Python 3.11: `make demo`, `make test`.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/installed
	$(BIN)/bids_brainfm_demo brainfm-demo

test: .venv/installed-test
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

clean:
	rm -rf .venv brainfm-demo

# torch comes first and by its exact version: a range may take a build of several gigabytes
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	# of the extra "gradients", without VTK (640 MB), which computing gradients does not need
	$(BIN)/python -m pip install --quiet --no-deps brainspace==0.3.0
	touch $@
