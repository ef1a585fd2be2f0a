# make train   make the demo data set and train on it; ARGS="ssv2 --epochs 200" trains something else
# make check   lint, types and the quick tests: under two minutes on 2 cores, for the work in between
# make test    lint, types and all tests: about ten minutes on 2 cores; ARGS="tests/engines -k student" runs some
# make gpu     qualify a GPU: its tests, then the benchmarks, twenty minutes: bench/results/gpu.*.md; ARGS="--third 1"
# make bench   every benchmark, about ten minutes on 2 cores: bench/results/*.json, and pictures of them
# make tiny-clip   train the demo's own CLIP again into engines/tiny_clip: minutes on 2 cores; ARGS="--seed 1"
#
# The first of them sets up .venv. PYTHON=python3 uses that interpreter instead and installs nothing, for machines
# without a network.

VENV := .venv
# As the console scripts do (tgmae/cli/__init__.py).
export OMP_WAIT_POLICY ?= PASSIVE
ifdef PYTHON
  SETUP :=
else
  PYTHON := $(VENV)/bin/python
  SETUP := $(VENV)/.installed
endif
ARGS ?=

.PHONY: train check test lint types gpu bench tiny-clip clean

train: $(SETUP)
	$(PYTHON) -m tgmae.cli.train $(ARGS) --pipeline dali

# Tests run in three processes of one thread each where pytest-xdist is installed: on two cores, as many of them wait.
PARALLEL = $(shell $(PYTHON) -c "import xdist" 2>/dev/null && echo "-n 3 --dist loadfile")

test: $(SETUP) lint types
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest $(PARALLEL) $(ARGS)

# The durations show which tests have become slow: mark those `slow`.
check: $(SETUP) lint types
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest $(PARALLEL) -m "not slow" --durations 10 --durations-min 3 $(ARGS)

# With a borrowed interpreter a missing linter is reported, not installed.
lint: $(SETUP)
	@if [ -n "$(SETUP)" ] || $(PYTHON) -c "import ruff" 2>/dev/null; then \
	  $(PYTHON) -m ruff check .; \
	else echo "lint skipped: $(PYTHON) has no ruff"; fi

types: $(SETUP)
	@if [ -n "$(SETUP)" ] || $(PYTHON) -c "import mypy" 2>/dev/null; then \
	  $(PYTHON) -m mypy; \
	else echo "types skipped: $(PYTHON) has no mypy"; fi

gpu: $(SETUP)
	$(PYTHON) -m bench.gpu $(ARGS)

# A part that fails does not keep the others from running.
bench: $(SETUP)
	@failed=""; \
	for name in decode loader masks overlap engines kernels step train; do \
	  $(PYTHON) -m bench.$$name || failed="$$failed $$name"; \
	done; \
	$(PYTHON) -m bench.pictures || failed="$$failed pictures"; \
	[ -z "$$failed" ] || { echo "make bench: failed:$$failed"; exit 1; }

tiny-clip: $(SETUP)
	$(PYTHON) -m tgmae.shapes.tiny_clip $(ARGS)

$(VENV)/.installed: pyproject.toml constraints.txt
	@python3 -c 'import sys; sys.version_info >= (3, 11) or sys.exit("tgmae needs Python 3.11 or later; python3 is " + sys.version.split()[0])'
	@python3 -m venv $(VENV) || { echo "could not make $(VENV); where python3-venv is missing (Debian, Ubuntu), run 'apt-get install python3-venv' first"; exit 1; }
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV)
