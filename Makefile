# Everything runs in .venv, made from pinned versions: needs Python 3.11 or newer and make, nothing else.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
OLDEST := .venv-oldest

.PHONY: demo test oldest gpu benchmark clean

demo: $(STAMP)  ## train once, come out tuned: digits, plain against tuned against a random search
	OMP_NUM_THREADS=1 $(BIN)/python examples/digits.py

# Processes with one thread each: threads of several would wait for each other. Two more than cores, for the tests of the
# search mostly wait for trials.
test: $(STAMP)  ## linters, types, import rules, doctests, README and the whole suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --dist loadfile \
	    -n $$($(BIN)/python -c 'import os; print(min((os.cpu_count() or 1) + 2, 8))')

oldest: $(OLDEST)/.installed  ## the tests with the oldest versions that pyproject.toml allows; linters and examples aside
	PATH="$(CURDIR)/$(OLDEST)/bin:$$PATH" $(OLDEST)/bin/python -m pytest -q -W default tests --ignore tests/test_package.py \
	    --ignore tests/examples

gpu: $(STAMP)  ## tests and benchmarks that need a CUDA device
	$(BIN)/python -m pytest -q -m gpu
	$(BIN)/python examples/benchmarks/overhead.py --device cuda
	$(BIN)/python examples/benchmarks/footprint.py --device cuda
	$(BIN)/python examples/benchmarks/footprint.py --device cuda --crowded

benchmark: $(STAMP)  ## time of a tuned run against a plain one
	$(BIN)/python examples/benchmarks/overhead.py

clean:
	rm -rf .venv $(OLDEST) build *.egg-info

# torch first and at its pin: left to the resolver, it would be the newest build with all of CUDA.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hypergrad needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check $$(grep -E '^torch==' constraints.txt)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt setuptools
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

# The build of torch that this brings is the index's own: on Linux with all of CUDA, unless pip is told of another.
$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q --disable-pip-version-check -c constraints-oldest.txt setuptools torch
	$(OLDEST)/bin/python -m pip install -q --disable-pip-version-check -c constraints-oldest.txt --no-build-isolation -e .
	$(OLDEST)/bin/python -m pip install -q --disable-pip-version-check -c constraints-oldest.txt \
	    'jsonargparse[signatures]' lion-pytorch matplotlib pandas plotly prodigyopt pytest schedulefree scikit-learn torchmetrics
	touch $@
