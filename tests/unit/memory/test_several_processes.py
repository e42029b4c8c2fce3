"""The simulated peak of rank 0 of two processes equals that of a real launch on CPU, to the byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from peftbench.data.batches import compute_micro_batching
from peftbench.data.sources import Files
from peftbench.memory.devices import get_device_facts
from peftbench.memory.launch_config import load_launch_config
from peftbench.memory.simulation.step import MemorySimulation
from peftbench.methods.base import Method
from peftbench.methods.full import Full
from peftbench.methods.lora import Lora
from peftbench.profiler.memory_breakdown import MemoryPeak
from peftbench.recipe.schema import Data, Evaluate, Model, Profile, Recipe, Train
from peftbench.record import RunRecord, read_record
from peftbench.tasks.summarization import Summarization
from tests.helpers.paths import REPOSITORY
from tests.helpers.records import count_labels_per_row

PROCESSES = 2
WIDTH, SHORT = 48, 24
"""Tokens per row; SHORT is shorter than any example, so that no row of a micro-batch is padded."""
BUCKET = 300_000
"""Elements of ZeRO's buckets, so that there are several; the sizes in ds_configs/ would dominate a small step."""
SCALARS = 16
"""Bytes that an engine keeps from the previous step; tracking of the real run starts after their allocation."""
RUNS = 3
"""Runs of each training. The smallest peak counts: gloo's threads sometimes release sent buffers late."""
METHODS: dict[str, Method] = {"full": Full(), "lora": Lora(r=4)}


class Case(NamedTuple):
    """One training; by default with one micro-batch of padded rows."""

    method: str
    precision: str = "fp32"
    architecture: str = "gpt2_tied"
    micro_batch: int | None = None
    checkpointing: bool = False

    @property
    def name(self) -> str:
        return "-".join(map(str, self))

    def recipe(self, base: str, source: Files, output: Path) -> Recipe:
        """Return a recipe of three steps with the memory breakdown in the second."""
        width: dict[str, Any] = {"max_length": SHORT, "overlong": "drop"} if self.micro_batch else {"max_length": WIDTH}
        return Recipe(
            name=self.name,
            output_dir=str(output),
            save_model=False,
            method=METHODS[self.method],
            model=Model(path=base),
            task=Summarization(separator=" TL;DR:"),
            data=Data(source=source, padding="max_length", **width),
            train=Train(
                steps=3,
                global_batch_size=12,
                micro_batch_size=self.micro_batch,
                precision=self.precision,  # type: ignore[arg-type]
                gradient_checkpointing=self.checkpointing,
            ),
            evaluate=Evaluate(metrics=(), max_new_tokens=8, bootstrap_resamples=100),
            profile=Profile(untimed_steps=2, memory_breakdown=True),
        )


CASES = [
    case
    for method in METHODS
    for case in (
        Case(method),
        Case(method, "bf16", "llama_untied"),
        Case(method, "fp32", "llama_tied", 3),
        Case(method, "bf16", "gpt2_tied", 2, checkpointing=True),
    )
]
ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
POINTS = [
    pytest.param(engine, case, id=f"{engine}-{case.name}", marks=pytest.mark.slow)
    for engine in ENGINES
    for case in CASES
]

AccelerateConfig = Callable[[str], Path]


@pytest.fixture(scope="module")
def accelerate_config(tmp_path_factory: pytest.TempPathFactory) -> AccelerateConfig:
    """Return a function from engine to accelerate config; ZeRO-1 and ZeRO-2 have small buckets."""
    folder = tmp_path_factory.mktemp("accelerate")

    def write_config(engine: str) -> Path:
        name = {"ddp": "cpu2"}.get(engine, engine)
        path = REPOSITORY / "accel_configs" / f"{name}.yaml"
        if engine not in {"zero1", "zero2"}:
            return path
        ds_config = json.loads((REPOSITORY / "ds_configs" / f"{engine}.json").read_text(encoding="utf-8"))
        ds_config["zero_optimization"] |= {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
        (folder / f"{engine}.json").write_text(json.dumps(ds_config), encoding="utf-8")
        text = path.read_text(encoding="utf-8").replace(f"ds_configs/{engine}.json", str(folder / f"{engine}.json"))
        (folder / path.name).write_text(text, encoding="utf-8")
        return folder / path.name

    return write_config


@pytest.fixture(scope="module")
def recipes(
    base_folder: Callable[[str], Path], sources: dict[str, Files], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Case], Recipe]:
    """Return a function from engine and case to a recipe."""
    output = tmp_path_factory.mktemp("several")

    def build_recipe(engine: str, case: Case) -> Recipe:
        source = sources["free" if case.micro_batch else "max_length"]
        return case.recipe(str(base_folder(case.architecture)), source, output / engine)

    return build_recipe


@pytest.fixture(scope="module")
def measure(
    accelerate_config: AccelerateConfig, recipes: Callable[[str, Case], Recipe], request: pytest.FixtureRequest
) -> Any:
    """Return a function from engine and case to rank 0's record; all selected cases of an engine run in one launch."""
    items: list[Any] = [item for item in request.session.items if "measure" in getattr(item, "fixturenames", ())]
    launched_engines: set[str] = set()

    def read_smallest(engine: str, case: Case) -> RunRecord:
        cases = [item.callspec.params["case"] for item in items if item.callspec.params["engine"] == engine]
        if engine not in launched_engines:
            launched_engines.add(engine)
            launch(accelerate_config(engine), [run for case in cases for run in repeat_recipe(recipes(engine, case))])
        paths = [Path(run.output_dir) / run.name / "record.json" for run in repeat_recipe(recipes(engine, case))]
        record = min(map(read_record, paths), key=lambda record: record.memory_breakdown.peak_bytes)  # type: ignore[union-attr]
        assert record.engine is not None
        assert record.engine.name == engine
        if case.micro_batch:
            assert record.tokens is not None
            assert record.tokens.real == record.tokens.padded
        assert record.memory_breakdown is not None
        assert record.state_bytes is not None
        bytes_by_category = record.memory_breakdown.bytes_by_category
        # Counted independently at the end of the run, when weights that ZeRO-3 gathered in evaluation are still live.
        assert bytes_by_category["optimizer_state"] == record.state_bytes.optimizer
        assert bytes_by_category["weights"] == record.state_bytes.weights or engine == "zero3"
        return record

    return read_smallest


def repeat_recipe(recipe: Recipe) -> list[Recipe]:
    """Return the recipe under several names."""
    return [recipe.model_copy(update={"name": f"{recipe.name}-{number}"}) for number in range(RUNS)]


def launch(accelerate: Path, recipes: list[Recipe]) -> None:
    """Run the recipes in two processes."""
    files = []
    for recipe in recipes:
        path = Path(recipe.output_dir) / f"{recipe.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(recipe.model_dump_json(), encoding="utf-8")
        files.append(str(path))
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(accelerate),
        "--num_processes",
        str(PROCESSES),
        "--main_process_port",
        "0",
        str(REPOSITORY / "tests" / "unit" / "memory" / "launched.py"),
        *files,
    ]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
    }
    with (Path(files[0]).parent / "log.txt").open("w", encoding="utf-8") as log:
        subprocess.run(command, cwd=REPOSITORY, env=environment, check=False, stdout=log, stderr=log)


def simulate(recipe: Recipe, accelerate: Path, labels: int) -> MemoryPeak:
    """Return the simulated peak of the same step."""
    launch_config = load_launch_config(accelerate, PROCESSES, recipe)
    accumulation, rows = compute_micro_batching(
        recipe.train.global_batch_size, recipe.train.resolved_micro_batch_size, PROCESSES
    )
    with MemorySimulation(
        recipe,
        get_device_facts("cpu").capability,
        accumulation,
        has_padding=recipe.data.max_length == WIDTH,
        launch_config=launch_config,
    ) as simulation:
        simulation.simulate_training(rows, recipe.data.max_length or 0, labels)
    return simulation.memory_tracker.find_peak()


@pytest.mark.multiprocess
@pytest.mark.parametrize(("engine", "case"), POINTS)
def test_simulated_peak_of_rank_0_equals_the_real_one(  # noqa: PLR0917 — fixtures
    engine: str,
    case: Case,
    measure: Any,
    accelerate_config: AccelerateConfig,
    recipes: Callable[[str, Case], Recipe],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shards of weights and states, buckets, gathered weights and all other categories are equal."""
    monkeypatch.chdir(REPOSITORY)  # accelerate configs name DeepSpeed's configs relative to it
    record: RunRecord = measure(engine, case)
    recipe, breakdown = recipes(engine, case), record.memory_breakdown
    assert breakdown is not None
    simulated = simulate(
        recipe, accelerate_config(engine), count_labels_per_row(record, recipe.train.global_batch_size)
    )
    assert (simulated.operation, simulated.step_part) == (breakdown.operation, breakdown.step_part)
    assert simulated.nbytes == pytest.approx(breakdown.peak_bytes, rel=0, abs=SCALARS)
    assert simulated.bytes_by_category == pytest.approx(breakdown.bytes_by_category, rel=0, abs=SCALARS)
