# `make demo` and `make test` set everything up: a virtual environment in .venv with pinned packages.
PYTHON ?= python3
BIN := .venv/bin
# Small models run fastest on one thread; two processes then use two cores.
export OMP_NUM_THREADS ?= 1

SCORING := $(addprefix tests/test_, scoring.py batched.py selection.py search.py evolution.py families.py)

.PHONY: demo demo-fresh demo-compare test test-portable fuzz soak soak-workers bench gpu lint parity sanitize clean

.venv/installed: pyproject.toml setup.py constraints.txt olmfast/__init__.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: .venv/installed
	$(BIN)/olmfast run examples/demo/merge.yaml --overwrite

demo-fresh: .venv/installed
	$(BIN)/python examples/demo/fresh.py

demo-compare: .venv/installed
	$(BIN)/python examples/demo/compare.py

test: .venv/installed
	$(BIN)/pytest tests -n 2 --dist loadfile

# The scoring tests as an older processor rounds, with two threads: no promise may rest on one machine's rounding.
test-portable: export OMP_NUM_THREADS = 2
test-portable: export OMP_WAIT_POLICY = passive
test-portable: export ATEN_CPU_CAPABILITY = avx2
test-portable: export ONEDNN_MAX_CPU_ISA = AVX2
test-portable: export MKL_ENABLE_INSTRUCTIONS = AVX2
test-portable: .venv/installed
	$(BIN)/pytest $(SCORING) -n 2 -k "not every_family or llama or gemma2"

# Kills, full disks and changed models; `make soak KILLS=100 EVERY=10 CHANGES=10 SEED=1`: fewer, and others.
KILLS ?= 1000
EVERY ?= 1
CHANGES ?= 200
SEED ?= 0
soak: .venv/installed
	$(BIN)/python tests/soak/soak.py --kills $(KILLS) --every $(EVERY) --changes $(CHANGES) --seed $(SEED)

# Ray workers, raylets and drivers killed in the middle of runs; needs the extra `cluster`.
soak-workers: .venv/installed
	$(BIN)/python tests/soak/workers.py --kills $(or $(WORKERS_KILLED),10) --seed $(SEED)

# Malformed input, a hundred thousand cases of it; `make fuzz CASES=1000`: some. The tests try a few hundred.
fuzz: .venv/installed
	$(BIN)/python tests/fuzz/fuzz.py --cases $(or $(CASES),100000)

bench: .venv/installed
	$(BIN)/pytest bench --benchmark-only

# Where there is a GPU: whether all is right on it, and how fast; `make gpu PARTS="rates swap"`: some of it.
gpu: .venv/installed
	bench/gpu.sh $(PARTS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check olmfast kernels bench examples
	rm -rf build/typecheck build/lib*  # else modules that are gone would be installed again
	$(BIN)/python setup.py --quiet build_py --build-lib build/typecheck
	cd build && MYPYPATH=typecheck ../$(BIN)/mypy --config-file ../pyproject.toml
	cd build && MYPYPATH=typecheck:../bench:../examples/demo ../$(BIN)/mypy --config-file ../pyproject.toml ../bench ../examples
	cp pyproject.toml build/typecheck && cd build/typecheck && ../../$(BIN)/lint-imports --no-logo --no-cache

sanitize: .venv/installed
	$(BIN)/python tests/shards/sanitize.py

# mergekit in an environment of its own: what it needs beside torch and transformers is no business of ours.
build/parity/installed: constraints.txt
	test -x build/parity/bin/python || $(PYTHON) -m venv build/parity
	build/parity/bin/python -m pip install --quiet --constraint constraints.txt mergekit==0.1.5
	touch $@

parity: .venv/installed build/parity/installed
	OLMFAST_MERGEKIT=build/parity/bin/python $(BIN)/pytest tests/parity

clean:
	rm -rf .venv build dist *.egg-info runs olmfast/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
