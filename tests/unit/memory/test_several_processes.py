"""What a rehearsal of one of several processes books is what such a process really holds, on the CPU, to the byte."""

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
from peftbench.memory.launch_config import load_launch_config
from peftbench.memory.simulation.step import MemorySimulation
from peftbench.methods.base import Method
from peftbench.methods.full import Full
from peftbench.methods.lora import Lora
from peftbench.profiler.memory_breakdown import MemoryPeak
from peftbench.recipe.schema import Data, Evaluate, Model, Profile, Recipe, Train
from peftbench.record import RunRecord, read_record
from tests.helpers.paths import REPOSITORY
from tests.unit.memory.conftest import labels_a_row

PROCESSES = 2
WIDTH, SHORT = 48, 24
"""Tokens of a row; the shorter is shorter than any example, so that no row of a micro-batch is padded."""
BUCKET = 300_000
"""Values of ZeRO's buckets, so that there are several: with those of ds_configs/ they are most of a small step."""
SCALARS = 16
"""Bytes of what an engine keeps from the step before, of which a real book, which begins with a step, does not know."""
RUNS = 3
"""Of each training; the smallest peak counts: gloo's threads sometimes hold what they sent for a little longer."""
METHODS: dict[str, Method] = {"full": Full(), "lora": Lora(r=4)}


class Case(NamedTuple):
    """A training; the default is one micro-batch of padded rows."""

    method: str
    precision: str = "fp32"
    architecture: str = "gpt2_tied"
    micro_batch: int | None = None
    checkpointing: bool = False

    @property
    def name(self) -> str:
        return "-".join(map(str, self))

    def recipe(self, base: str, source: Files, output: Path) -> Recipe:
        """Three steps; who held the memory is looked at in the second."""
        width: dict[str, Any] = {"max_length": SHORT, "overlong": "drop"} if self.micro_batch else {"max_length": WIDTH}
        return Recipe(
            name=self.name,
            output_dir=str(output),
            save_model=False,
            method=METHODS[self.method],
            model=Model(path=base),
            data=Data(source=source, separator=" TL;DR:", padding="max_length", **width),
            train=Train(
                steps=3,
                global_batch_size=12,
                micro_batch_size=self.micro_batch,
                precision=self.precision,  # type: ignore[arg-type]
                gradient_checkpointing=self.checkpointing,
            ),
            evaluate=Evaluate(generate=False, max_new_tokens=8, bootstrap_resamples=100),
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
FAST = {("zero2", CASES[0])}
POINTS = [
    pytest.param(engine, case, id=f"{engine}-{case.name}", marks=() if (engine, case) in FAST else pytest.mark.slow)
    for engine in ENGINES
    for case in CASES
]

Given = Callable[[str], Path]


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Given:
    """Given an engine, its accelerate file; ZeRO's first stages have small buckets."""
    folder = tmp_path_factory.mktemp("accelerate")

    def written(engine: str) -> Path:
        name = {"ddp": "cpu2"}.get(engine, engine)
        path = REPOSITORY / "accel_configs" / f"{name}.yaml"
        if engine not in {"zero1", "zero2"}:
            return path
        asked = json.loads((REPOSITORY / "ds_configs" / f"{engine}.json").read_text(encoding="utf-8"))
        asked["zero_optimization"] |= {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
        (folder / f"{engine}.json").write_text(json.dumps(asked), encoding="utf-8")
        text = path.read_text(encoding="utf-8").replace(f"ds_configs/{engine}.json", str(folder / f"{engine}.json"))
        (folder / path.name).write_text(text, encoding="utf-8")
        return folder / path.name

    return written


@pytest.fixture(scope="module")
def recipes(
    base_folder: Callable[[str], Path], sources: dict[str, Files], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Case], Recipe]:
    """Given an engine and a case, its recipe."""
    output = tmp_path_factory.mktemp("several")

    def made(engine: str, case: Case) -> Recipe:
        source = sources["free" if case.micro_batch else "max_length"]
        return case.recipe(str(base_folder(case.architecture)), source, output / engine)

    return made


@pytest.fixture(scope="module")
def held(launcher: Given, recipes: Callable[[str, Case], Recipe], request: pytest.FixtureRequest) -> Any:
    """Given an engine and a case, what its first process held; all that this session asks for run in one launch."""
    users: list[Any] = [item for item in request.session.items if "held" in getattr(item, "fixturenames", ())]
    done: set[str] = set()

    def recorded(engine: str, case: Case) -> RunRecord:
        asked = [item.callspec.params["case"] for item in users if item.callspec.params["engine"] == engine]
        if engine not in done:
            done.add(engine)
            launch(launcher(engine), [run for case in asked for run in runs(recipes(engine, case))])
        places = [Path(run.output_dir) / run.name / "record.json" for run in runs(recipes(engine, case))]
        record = min(map(read_record, places), key=lambda record: record.memory_breakdown.peak_bytes)  # type: ignore[union-attr]
        assert record.engine is not None
        assert record.engine.name == engine
        if case.micro_batch:
            assert record.tokens is not None
            assert record.tokens.real == record.tokens.padded
        assert record.memory_breakdown is not None
        assert record.state_bytes is not None
        kinds = record.memory_breakdown.bytes_by_category
        # Counted by other means, at the end of the run; by then ZeRO's third stage has weights whole from evaluation.
        assert kinds["optimizer_state"] == record.state_bytes.optimizer
        assert kinds["weights"] == record.state_bytes.weights or engine == "zero3"
        return record

    return recorded


def runs(recipe: Recipe) -> list[Recipe]:
    """The same training several times."""
    return [recipe.model_copy(update={"name": f"{recipe.name}-{number}"}) for number in range(RUNS)]


def launch(accelerate: Path, recipes: list[Recipe]) -> None:
    """Run them in two processes."""
    files = []
    for recipe in recipes:
        place = Path(recipe.output_dir) / f"{recipe.name}.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(recipe.model_dump_json(), encoding="utf-8")
        files.append(str(place))
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
        str(REPOSITORY / "tests" / "budget" / "launched.py"),
        *files,
    ]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
    }
    with (Path(files[0]).parent / "log.txt").open("w", encoding="utf-8") as log:
        subprocess.run(command, cwd=REPOSITORY, env=environment, check=False, stdout=log, stderr=log, timeout=240)


def rehearsed(recipe: Recipe, accelerate: Path, labels: int) -> MemoryPeak:
    """The peak of the same step, of which nothing was computed."""
    world = load_launch_config(accelerate, PROCESSES, recipe)
    accumulation, rows = compute_micro_batching(
        recipe.train.global_batch_size, recipe.train.resolved_micro_batch_size, PROCESSES
    )
    with MemorySimulation(
        recipe, "cpu", accumulation, has_padding=recipe.data.max_length == WIDTH, launch_config=world
    ) as rehearsal:
        rehearsal.simulate_training(rows, recipe.data.max_length or 0, labels)
    return rehearsal.memory_tracker.find_peak()


@pytest.mark.multiprocess
@pytest.mark.parametrize(("engine", "case"), POINTS)
def test_the_peak_of_one_of_several_processes(  # noqa: PLR0917 — fixtures
    engine: str,
    case: Case,
    held: Any,
    launcher: Given,
    recipes: Callable[[str, Case], Recipe],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Parts of weights and states, buckets, gathered weights and all else: each as where it was really made."""
    monkeypatch.chdir(REPOSITORY)  # from which accelerate files name DeepSpeed's
    record: RunRecord = held(engine, case)
    recipe, found = recipes(engine, case), record.memory_breakdown
    assert found is not None
    expected = rehearsed(recipe, launcher(engine), labels_a_row(record, recipe.train.global_batch_size))
    assert (expected.operation, expected.step_part) == (found.operation, found.step_part)
    assert expected.nbytes == pytest.approx(found.peak_bytes, rel=0, abs=SCALARS)
    assert expected.bytes_by_category == pytest.approx(found.bytes_by_category, rel=0, abs=SCALARS)
