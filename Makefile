# Everything runs in .venv, created on first use from pyproject.toml under constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
# The demo and the tests run offline.
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test test-all test-engines test-slow test-slurm lint prose readme architectures coverage picture clean

demo: .venv/installed
	@echo "Three suites of 6, 4 and 3 runs. On two CPU cores they take 6 to 9 minutes (docs/results/README.md)."
	$(BIN)/peftbench run recipes/demo/suite.yaml
	$(BIN)/peftbench run recipes/demo/libraries.yaml
	$(BIN)/peftbench run recipes/demo/budget.yaml
	@echo "Open in a browser: report.html in runs/demo, runs/demo_libraries and runs/demo_budget"

# The fast tier. Two workers: most tests run one process with one thread.
test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Every combination of the compatibility table that runs on CPU, each in two processes.
test-engines: .venv/installed
	$(BIN)/python -m pytest -m "slow or multiprocess" tests/distributed

# Families of models, memory simulations, whole-process tests and full sweeps, except what the two other slow tiers run.
test-slow: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "slow and not gpu and not slurm" --ignore tests/distributed \
	    --ignore tests/slurm --ignore tests/launch/test_survival.py --ignore tests/launch/test_two_hosts.py

# A real SLURM in a temporary folder, as root, and interruptions of runs on one host and on two. Needs Debian's slurm-wlm and
# munge (docs/guides/slurm.md). One worker waits for the cluster's jobs; the other runs the remaining tests.
test-slurm: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "slow or not slow" \
	    tests/slurm tests/launch/test_survival.py tests/launch/test_two_hosts.py

test-all: test test-engines test-slow test-slurm

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.unit.docs.prose

# Prints every banned phrase with its plain rewrite; PATHS limits it to some folders.
prose: .venv/installed
	$(BIN)/python -m tests.unit.docs.prose $(PATHS)

# Generates the numbers in README.md and docs/ from committed records.
readme: .venv/installed
	$(BIN)/peftbench report docs/results/demo --update-file README.md --marker demo
	$(BIN)/peftbench report docs/results/demo_libraries --update-file README.md --marker libraries
	$(BIN)/peftbench report docs/results/demo_budget --update-file README.md --marker budget
	$(BIN)/peftbench report docs/results/methods --update-file docs/results/methods.md --marker methods
	$(BIN)/peftbench report docs/results/demo_seeds --update-file docs/results/README.md --marker seeds
	$(BIN)/peftbench report docs/results/demo_rates --update-file docs/results/README.md --marker rates --group-by optimizer.learning_rate
	$(BIN)/peftbench estimate recipes/gpt2_cnn_dm/full.yaml train.precision=fp32 --device t4 --update-file docs/concepts/memory.md --marker plan
	$(BIN)/peftbench estimate --suite recipes/budget16/suite.yaml --budget 16GiB --update-file docs/concepts/memory.md --marker ladder
	$(BIN)/python benchmarks/vs_trainer --report benchmarks/vs_trainer/records/cpu_bf16 --update-file benchmarks/vs_trainer/README.md
	$(BIN)/python benchmarks/vs_trainer --report benchmarks/vs_trainer/records/cpu_bf16_four --update-file benchmarks/vs_trainer/README.md --marker vs_trainer_four
	$(BIN)/python benchmarks/vs_trainer --report benchmarks/vs_trainer/records/cuda_bf16 --update-file benchmarks/vs_trainer/README.md --marker vs_trainer_gpu
	$(BIN)/python -m peftbench.distributed.compatibility_docs > .compatibility.md
	mv .compatibility.md docs/reference/compatibility.md

# Runs and plans a tiny model of every architecture with every method (about 15 minutes).
architectures: .venv/installed
	$(BIN)/python -m tests.unit.memory.architecture_table > .architectures.md
	mv .architectures.md docs/reference/architectures.md

# Simulates the coverage of the report's intervals (about four minutes).
coverage: .venv/installed
	$(BIN)/python benchmarks/seed_coverage/simulation.py docs/results/demo_seeds --update-file docs/concepts/statistics.md --marker coverage

# Renders the report page's picture in README.md from committed records; needs Chromium.
picture: .venv/installed
	$(BIN)/python -m tests.unit.report.page.picture

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "peftbench needs Python 3.11 or newer; run make PYTHON=python3.11")'
	@echo "Installing peftbench and its requirements into .venv (a few minutes, about 3 GB) ..."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,tensorboard]"
	touch $@

clean:
	rm -rf .venv runs
