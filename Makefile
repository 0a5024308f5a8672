# make demo | test | check | kernels | bench: each is enough on a fresh machine with Python 3.11+ and pip.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2

.PHONY: install test demo check kernels bench clean

install: .venv/installed

# torch first and by name: on machines without a GPU this is the CPU build; anything looser pulls gigabytes of CUDA.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

test: install
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -P -m pytest -q -n $(WORKERS) --dist loadfile --durations=15

demo: install
	$(BIN)/python -P examples/demo.py

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

kernels: install
	$(BIN)/python -P benchmarks/compiled_kernels.py

bench: install
	$(BIN)/python -P benchmarks/solvers.py
	$(BIN)/python -P benchmarks/memory.py

clean:
	rm -rf .venv build *.egg-info demo-output
