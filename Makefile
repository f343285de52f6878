# make setup | train | claim | test | test-all | lint | bench | bench-gpu | bench-check. ARGS goes on to the trainer or to pytest; PYTHON=...
# names the interpreter to use.

CANDIDATES := $(or $(PYTHON),python3 python3.11 python3.12 python3.13)
STAMP := .venv/.installed
BIN := .venv/bin
# What matters most comes first: within its time bench-gpu may not reach the end.
FIRST := $(wildcard $(patsubst %,bench/test_%.py,update rssm_observe kernels scaling))
BENCHES := $(FIRST) $(filter-out $(FIRST),$(sort $(wildcard bench/test_*.py)))
# torch, triton, numpy, pytest and pytest-benchmark are enough for it; nothing of ours has to be installed.
GPU_PYTHON := $(or $(PYTHON),$(wildcard $(BIN)/python),python3)

.PHONY: setup train claim test test-all lint bench bench-gpu bench-check
setup: $(STAMP)

train: setup
	$(BIN)/python -m fastdreamer.train --compile $(ARGS)

# What MuDreamer is for, on two cores: it and DreamerV3 on Catch with moving textures behind it, each on a thread, some 25
# minutes of processor time; then what their latents hold. A repeated command goes on; SEED=1 is another pair of runs.
SEED ?= 0
claim: setup
	@printf '%s\n' mudreamer dreamerv3 | xargs -P 2 -I{} bash -o pipefail -c 'run=runs/claim/{}-$(SEED); \
		how="--preset demo --background noise --frames 40000 --objective {} --seed $(SEED) --logdir runs/claim --name {}-$(SEED)"; \
		if ls $$run/checkpoints/*/manifest.json >/dev/null 2>&1; then how="--resume $$run"; else rm -rf $$run; fi; \
		$(BIN)/python -m fastdreamer.train $$how --threads 1 $(ARGS) 2>&1 | (trap "" INT; exec sed -u "s/^/{}: /")'
	$(BIN)/python -m fastdreamer.probe runs/claim/mudreamer-$(SEED) runs/claim/dreamerv3-$(SEED) --episodes 400 \
		--picture runs/claim/distractors-$(SEED).png

# On all cores: at most six minutes of processor time together.
test: setup
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow and not gpu and not thorough" $(ARGS)

# The interpreter's long cases, ahead-of-time compilation of every preset, many kills, and all of `make test`.
test-all: setup
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow and not gpu" $(ARGS)

bench: setup
	$(BIN)/python -m pytest $(if $(findstring bench/,$(ARGS)),,bench) -m "not long" $(ARGS)

# Ten minutes at most. Results are stored as they come, so what was measured by then stays.
bench-gpu:
	@$(GPU_PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null || { \
		echo "bench-gpu needs PyTorch with a CUDA device: make bench measures without one." >&2; \
		exit 2; \
	}
	PYTHONPATH="$(CURDIR):$(CURDIR)/kernels" timeout --signal=INT --kill-after=20 580 \
		$(GPU_PYTHON) -m pytest $(BENCHES) -p no:cacheprovider $(ARGS)

# A fast subset, held against bench/results. Fails on a loss, and where nothing can be compared.
bench-check: setup
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	$(BIN)/python -m pytest bench -m quick --results "$$folder" -q $(ARGS) && \
	$(BIN)/python bench/tables.py --compare "$$folder"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# A candidate has to run to count: a shim may exist for a version that is not installed.
# Debian ships venv without ensurepip unless python3-venv is installed; the interpreter's own pip can then fill the
# environment from outside, which needs no root.
$(STAMP): pyproject.toml
	@for python in $(CANDIDATES); do \
		$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; python=; \
	done; \
	if [ -z "$$python" ]; then \
		echo "fastdreamer needs Python 3.11 or newer: install it, or name it by make PYTHON=/path/to/python3.11." >&2; \
		exit 1; \
	fi; \
	$(BIN)/python -c 'import pip' 2>/dev/null || $$python -m venv .venv >/dev/null 2>&1 || { \
		$$python -m venv --clear --without-pip .venv && \
		$$python -m pip --python $(BIN)/python install --quiet pip; \
	} || { \
		echo "$$python cannot make an environment in .venv: install pip and venv for it (apt install python3-venv)." >&2; \
		exit 1; \
	}
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -e '.[envs,video,dev]'
	@touch $@
