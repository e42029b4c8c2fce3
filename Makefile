# Everything runs in .venv, made on first use from pyproject.toml under constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
# Nothing is asked of a hub: the demo and the tests are offline.
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test test-all test-engines test-slurm lint readme picture clean

demo: .venv/installed
	$(BIN)/peftbench compare recipes/demo/suite.yaml
	$(BIN)/peftbench compare recipes/demo/budget.yaml
	@echo "the pages, for a browser: runs/demo/report.html and runs/demo_budget/report.html"

# Two at once: most of a test is one process with one thread.
test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-all: .venv/installed
	$(BIN)/python -m pytest -m "slow or not slow"

# Every combination of the compatibility table that runs on CPU, in two processes each.
test-engines: .venv/installed
	$(BIN)/python -m pytest -m multiprocess tests/distributed

# A real SLURM in a folder of its own, where Debian's packages for it are installed (docs/guides/slurm.md), as root; and
# all that can befall a run, on one host and on two. Beside one cluster, whose jobs wait much, one worker does the rest.
test-slurm: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "slow or not slow" \
	    tests/slurm tests/launch/test_survival.py tests/launch/test_two_hosts.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The figures in README.md and docs/ come from committed records, never from a keyboard.
readme: .venv/installed
	$(BIN)/peftbench report docs/results/demo --into README.md --block demo
	$(BIN)/peftbench report docs/results/demo_budget --into README.md --block budget
	$(BIN)/peftbench report docs/results/demo_seeds --into docs/results/README.md --block seeds
	$(BIN)/peftbench report docs/results/demo_rates --into docs/results/README.md --block rates --by optimizer.learning_rate
	$(BIN)/peftbench estimate --config recipes/gpt2_cnn_dm/full.yaml train.precision=fp32 --device t4 --into docs/concepts/memory.md --block plan
	$(BIN)/peftbench estimate --suite recipes/budget16/suite.yaml --budget 16GiB --into docs/concepts/memory.md --block ladder
	$(BIN)/python benchmarks/vs_trainer --report benchmarks/vs_trainer/records/cpu_bf16 --into benchmarks/vs_trainer/README.md
	$(BIN)/python benchmarks/vs_trainer --report benchmarks/vs_trainer/records/cpu_bf16_four --into benchmarks/vs_trainer/README.md --block vs_trainer_four
	$(BIN)/python benchmarks/vs_trainer --report benchmarks/vs_trainer/records/cuda_bf16 --into benchmarks/vs_trainer/README.md --block vs_trainer_gpu
	$(BIN)/python -m peftbench.distributed.compatibility_docs > .compatibility.md
	mv .compatibility.md docs/reference/compatibility.md

# The picture of the page in README.md, from committed records; needs Chromium.
picture: .venv/installed
	$(BIN)/python -m tests.unit.report.page.picture

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "peftbench needs Python 3.11 or newer; run make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,tensorboard]"
	touch $@

clean:
	rm -rf .venv runs
