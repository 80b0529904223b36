# Two commands on a fresh machine with Python 3.11 or newer and pip: `make demo` and `make test`.
# The first one to run makes .venv and installs into it; nothing outside this directory is changed.

# The first of these that is Python 3.11 or newer; `make PYTHON=/path/to/python ...` overrides it.
PYTHON ?= $(shell for p in python3 python3.11 python3.12; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
# Python 3.11 gets exactly the versions the tests ran with. Other versions of Python need other versions of jax
# (0.11 and later want 3.12), so there only the bounds of requirements.txt hold.
CONSTRAINTS = $$($(BIN)/python -c 'import sys; print("-c constraints.txt" if sys.version_info[:2] == (3, 11) else "")')

# A training step on CPU takes and frees hundreds of MB. In huge pages a step takes a quarter less time, where the system gives them
# only to those who ask. Beside PyTorch in one process freed memory is kept too: making room for huge pages would stall either side.
demo: export GLIBC_TUNABLES = glibc.malloc.hugetlb=1
bench: export GLIBC_TUNABLES = glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000

.PHONY: install demo test test-all bench lint clean

install: .venv/.installed

demo: .venv/.installed
	$(BIN)/andesvl demo --out out/demo

test: .venv/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: .venv/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --slow

bench: .venv/.peers
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/train_step.py --config 33m
	$(BIN)/python benchmarks/train_step.py --config nano
	$(BIN)/python benchmarks/vision.py

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv .cache .pytest_cache .ruff_cache out build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Debian ships `venv` without its copy of pip unless python3-venv is installed; the system's pip then serves.
.venv/pyvenv.cfg:
	@test -n "$(PYTHON)" || { echo "make: found no Python 3.11 or newer; install one or give PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: $(PYTHON) is $$($(PYTHON) -V 2>&1), expected Python 3.11 or newer; give PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv || { $(PYTHON) -m venv --clear --without-pip .venv && \
		$(PYTHON) -m pip --python $(BIN)/python install pip; }

.venv/.installed: .venv/pyvenv.cfg requirements.txt constraints.txt pyproject.toml
	$(BIN)/python -m pip install $(CONSTRAINTS) -e .
	$(BIN)/python -c 'from andesvl_jax.kernels import cpu; cpu.available()'  # built once, where there is a C++ compiler
	touch $@

.venv/.peers: .venv/.installed
	$(BIN)/python -m pip install $(CONSTRAINTS) -e '.[peers]'
	touch $@

.venv/.dev: .venv/.installed
	$(BIN)/python -m pip install $(CONSTRAINTS) -e '.[dev]'
	touch $@
