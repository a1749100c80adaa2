# The only entry: demo, test, check, test-gpu, bench, bench-aot, fix. PYTHON and TORCH choose other versions.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin

.PHONY: demo test check test-gpu bench bench-aot fix clean

demo: $(VENV)/.core
	$(BIN)/lowvram-i2v demo --folder demo_out

# One thread a worker: two workers with two threads each get in each other's way. In order of names, long files come early.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python tests/repo/typecheck.py
	$(BIN)/python -m pytest -q tests/repo

# Needs a CUDA device, torch, transformers, pytest and hypothesis; other tests' packages are not asked for.
test-gpu:
	$(PYTHON) -m pytest -q -m gpu $$(grep -rl 'mark\.gpu' tests --include='test_*.py')

# Full-size measurements on a CUDA device, in WORK (64 GB of disk); the rows printed belong in docs/measurements.md.
WORK ?= build/bench
bench:
	$(PYTHON) tests/bench/convert_full_size.py --work $(WORK)/convert
	$(PYTHON) tests/bench/full_size.py --work $(WORK) --scheme int8 fp8 --flags=--no-cache \
	  --run 6gb:512x512x129 6gb:960x544x129 6gb:1280x720x129 8gb:1280x720x129 12gb:1280x720x129 24gb:1280x720x129
	$(PYTHON) tests/bench/plans.py --processes 2
	$(PYTHON) tests/bench/streaming.py --model $(WORK)/int8 --resident -1 0 0:mapped
	$(PYTHON) tests/bench/streaming.py --model $(WORK)/int8 --size 1280x720 --resident -1 0 0:mapped
	$(PYTHON) tests/bench/timeline.py --model $(WORK)/int8
	$(PYTHON) tests/bench/decode.py
	$(PYTHON) tests/bench/fused.py
	$(PYTHON) tests/bench/attention.py
	$(PYTHON) tests/bench/diffusers_step.py

# What each Triton kernel asks of each card (shared memory, registers, spills, instructions), compiled without a GPU.
bench-aot: $(VENV)/.dev
	$(BIN)/python tests/aot/table.py

fix: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build dist demo_out $(VENV)

# torch first and by its own: a plain torch would bring gigabytes of CUDA packages.
$(VENV)/.core: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e .
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	touch $@
