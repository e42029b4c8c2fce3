"""Search of ``peftbench fit MODEL``: the rows, the sizes, the arguments and the answer."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from peftbench.errors import HubUnreachableError, ModelNotFoundError, RecipeError, UnsupportedModelError
from peftbench.memory.devices import UNKNOWN_DEVICE, get_device_facts
from peftbench.memory.families import load_families
from peftbench.memory.launch_config import load_launch_config
from peftbench.memory.model_fit.engine_files import copy_engine_files
from peftbench.memory.model_fit.host_memory import compute_host_bytes, compute_offloaded_bytes
from peftbench.memory.model_fit.method_search import MICRO_BATCH_SIZES
from peftbench.memory.model_fit.methods import FIT_METHODS, FitRequest, build_any_recipe
from peftbench.memory.model_fit.model_argument import find_model_argument, open_model
from peftbench.memory.model_fit.plan_points import PlanPoints, Size, plan_at
from peftbench.memory.plan import Plan
from peftbench.memory.search import MemoryTarget, with_micro_batch
from peftbench.memory.simulation.step import MemorySimulation
from peftbench.recipe.schema import Recipe
from tests.helpers.models import llama_config

GIB = 2**30


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return a folder with the config of a Llama of two layers."""
    folder = tmp_path / "model"
    llama_config(max_position_embeddings=512).save_pretrained(folder)
    return folder


def test_rows_are_those_of_the_command() -> None:
    """Full fine-tuning in six forms, then LoRA, QLoRA, DoRA, prompt tuning and the last layer."""
    assert [method.name for method in FIT_METHODS] == [
        "full",
        "full_8bit",
        "full_paged_8bit",
        "full_bf16_weights",
        "full_zero2_offload",
        "full_zero3_offload",
        "lora",
        "qlora",
        "dora",
        "prompt_tuning",
        "last_layer",
    ]
    recipes = {method.name: FitRequest("m", "m").build_recipe(method) for method in FIT_METHODS}
    assert recipes["full_paged_8bit"].optimizer.is_paged
    assert recipes["full_bf16_weights"].optimizer.weight_dtype == "bf16"
    assert recipes["qlora"].model.quantization == "nf4"
    assert recipes["dora"].method.model_dump()["use_dora"] is True
    checkpointed = {name for name, recipe in recipes.items() if recipe.train.gradient_checkpointing}
    assert checkpointed == set(recipes) - {"last_layer"}


def test_key_of_one_method_is_an_override_for_that_method() -> None:
    """method.r belongs to LoRA; the recipe of another row refuses it, and one that no row has is an error."""
    request = FitRequest("m", "m", ("method.r=4",))
    assert cast("Any", build_any_recipe(request)).method.r == 4
    full = next(method for method in FIT_METHODS if method.name == "full")
    with pytest.raises(RecipeError, match=r"method\.r"):
        request.build_recipe(full)
    with pytest.raises(RecipeError, match=r"train\.stepz"):
        build_any_recipe(FitRequest("m", "m", ("train.stepz=3",)))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["recipe.yaml"], None),
        (["recipe.yml", "train.steps=3"], None),
        (["record.json"], None),
        (["train.steps=3"], None),
        (["Qwen/Qwen2.5-7B"], ("Qwen/Qwen2.5-7B", [])),
        (["folder", "method.r=4"], ("folder", ["method.r=4"])),
        (["method.r=4", "config.json"], ("config.json", ["method.r=4"])),
        (["other.json"], ("other.json", [])),
        (["a=b"], ("a=b", [])),  # a folder with a config, e.g. of a run of a suite with axes
    ],
)
def test_argument_is_a_recipe_an_override_or_a_model(
    arguments: list[str], expected: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """.yaml and .yml are recipes, and so is a record; "=" is an override; anything else is a model."""
    monkeypatch.chdir(tmp_path)
    for folder in ("folder", "a=b"):
        Path(folder).mkdir()
        (Path(folder) / "config.json").write_text("{}", encoding="utf-8")
    Path("config.json").write_text("{}", encoding="utf-8")
    Path("other.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    Path("record.json").write_text('{"recipe_fingerprint": "x", "recipe": {}}', encoding="utf-8")
    assert find_model_argument(arguments) == expected


@pytest.mark.parametrize("arguments", [["gpt2", "gpt3"], ["gpt2", "recipe.yaml"]])
def test_second_model_or_recipe_is_refused(arguments: list[str]) -> None:
    """The sentence names the argument to omit."""
    with pytest.raises(RecipeError, match=f"{arguments[1]} is a second argument"):
        find_model_argument(arguments)


def test_config_file_needs_no_other_file(model: Path, tmp_path: Path) -> None:
    """A config under any name is copied, so that the files next to it are not read."""
    file = tmp_path / "small.json"
    (model / "config.json").rename(file)
    (tmp_path / "tokenizer.json").write_text("not a tokenizer", encoding="utf-8")
    with open_model(str(file)) as source:
        assert json.loads((Path(source.config_path) / "config.json").read_text(encoding="utf-8"))["hidden_size"] == 64
        assert source.parameters > 4096 * 64
        assert source.path == str(tmp_path)
    assert not Path(source.config_path).exists()


def test_shipped_config_is_found_by_short_name_in_any_case() -> None:
    """The owner may be omitted; the number of parameters is the published one."""
    member = load_families()["qwen2.5"].members[0]
    with open_model(member.name.partition("/")[2].lower()) as source:
        assert (source.path, source.parameters) == (member.name, member.parameters)


@pytest.mark.parametrize(("content", "reason"), [("t5", "an encoder and a decoder"), ("vit", "not a causal")])
def test_config_without_causal_architecture_is_refused(content: str, reason: str, tmp_path: Path) -> None:
    """The sentence names the architecture, not a key of a recipe."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": content}), encoding="utf-8")
    for argument in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(UnsupportedModelError, match=f"{content} .*{reason}") as caught, open_model(str(argument)):
            pass
        assert "model.path" not in str(caught.value)


def test_unknown_model_without_hub_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence lists the places searched and names the most similar shipped config."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises((HubUnreachableError, ModelNotFoundError)) as caught, open_model("somebody/qwen2.5-8b"):
        pass
    assert "not found in a folder, among the shipped configs or on the Hub" in str(caught.value)
    assert "e.g. Qwen/Qwen2.5-" in str(caught.value)


class _Planner:
    """Plans whose bytes are a function of the size; counts the plans."""

    def __init__(self, compute_bytes: Callable[[int, int], float], budget: int) -> None:
        self.compute_bytes, self.budget = compute_bytes, budget
        self.planned: list[Size] = []

    def plan(self, _recipe: Recipe, _target: MemoryTarget, rows: int, length: int) -> Plan:
        self.planned.append((rows, length))
        needed = int(self.compute_bytes(rows, length))
        verdict = "fits" if needed <= self.budget else "does not fit"
        return cast("Plan", SimpleNamespace(process_bytes=(needed, needed), verdict=verdict))


def _search(planner: _Planner, sizes: list[Size], monkeypatch: pytest.MonkeyPatch) -> tuple[Size | None, Size | None]:
    """Return the largest size that the search finds, and the one that trying all sizes finds."""
    monkeypatch.setattr("peftbench.memory.model_fit.plan_points.plan_at", planner.plan)
    recipe = build_any_recipe(FitRequest("m", "m"))
    points = PlanPoints(recipe, MemoryTarget(UNKNOWN_DEVICE, "x", planner.budget))
    largest = points.find_largest_size(sizes)
    fitting = [size for size in sizes if planner.compute_bytes(*size) <= planner.budget]
    return largest, fitting[-1] if fitting else None


@pytest.mark.parametrize("budget_gib", [1, 5, 6, 9, 17, 24, 41, 80, 1000])
@pytest.mark.parametrize("power", [1.0, 1.3, 2.0])
def test_search_finds_the_largest_size_with_few_plans(
    budget_gib: int, power: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer is that of trying all sizes, for memory that is linear in the tokens and for memory that is not."""
    planner = _Planner(lambda rows, length: 5 * GIB + 2**18 * (rows * length) ** power, budget_gib * GIB)
    for sizes in ([(rows, 1024) for rows in MICRO_BATCH_SIZES], [(1, 256 * step) for step in range(1, 513)]):
        planner.planned.clear()
        largest, expected = _search(planner, sizes, monkeypatch)
        assert largest == expected
        assert len(planner.planned) <= (6 if power == 1 else 15), planner.planned


def test_plans_of_other_sizes_save_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """A size that holds one that does not fit is not planned, and neither is one within a size that fits."""
    planner = _Planner(lambda rows, length: 2**20 * rows * length, 4 * GIB)
    monkeypatch.setattr("peftbench.memory.model_fit.plan_points.plan_at", planner.plan)
    points = PlanPoints(build_any_recipe(FitRequest("m", "m")), MemoryTarget(UNKNOWN_DEVICE, "x", planner.budget))
    assert points.find_largest_size([(rows, 2048) for rows in (1, 2, 3)]) == (2, 2048)
    before = len(planner.planned)
    assert points.find_largest_size([(rows, 4096) for rows in (2, 3)]) is None
    assert points.find_largest_size([(1, 1024), (2, 1024), (2, 2048)]) == (2, 2048)
    assert len(planner.planned) == before


@pytest.mark.parametrize("num_processes", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["full_zero2_offload", "full_zero3_offload"])
def test_offloaded_bytes_are_those_of_the_engine(
    name: str, num_processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a simulated step, DeepSpeed's code creates the offloaded tensors in CPU memory; they are counted."""
    llama_config(max_position_embeddings=512, hidden_size=256, intermediate_size=512).save_pretrained(tmp_path)
    method = next(method for method in FIT_METHODS if method.name == name)
    recipe = FitRequest(str(tmp_path), str(tmp_path)).build_recipe(method)
    assert method.engine is not None
    launch_file = copy_engine_files(method.engine, tmp_path / "configs")
    launch_config = load_launch_config(launch_file, num_processes, with_micro_batch(recipe, 1))
    counted: list[int] = []
    leave = MemorySimulation.__exit__

    def count_and_leave(simulation: MemorySimulation, *error: Any) -> None:
        counted.append(_count_cpu_bytes())
        leave(simulation, *error)

    monkeypatch.setattr(MemorySimulation, "__exit__", count_and_leave)
    before = _count_cpu_bytes()
    plan_at(recipe, MemoryTarget(get_device_facts("a10g"), "a10g", GIB, launch_config), 1, 64)
    with open_model(str(tmp_path)) as source:
        computed = compute_offloaded_bytes(launch_config.engine.name, source.parameters, num_processes)
        with_rounding = compute_host_bytes(recipe, launch_config, source.parameters)
    assert computed <= (counted[0] - before) * 1.01
    # ZeRO-2 has a buffer of the largest matrix, and whole buffers of matrices that the partitions divide.
    largest = 4 * 4096 * 256
    assert counted[0] - before <= computed * 1.01 + 2 * largest
    assert with_rounding is not None
    assert computed <= with_rounding < 2 * computed


def _count_cpu_bytes() -> int:
    """Return the bytes of all tensors in CPU memory with at least 1,000 values; views count once."""
    storages = {}
    for value in gc.get_objects():
        if type(value) in {torch.Tensor, torch.nn.Parameter} and value.device.type == "cpu" and value.numel() >= 1000:
            storage = value.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def test_plan_has_two_micro_batches_and_the_same_rows_in_evaluation(model: Path) -> None:
    """From the second micro-batch on, gradients exist in the forward pass; nothing is generated."""
    lora = next(method for method in FIT_METHODS if method.name == "lora")
    recipe = FitRequest(str(model), str(model)).build_recipe(lora)
    plan = plan_at(recipe, MemoryTarget(UNKNOWN_DEVICE, "a GPU", GIB), 3, 128)
    assert (plan.micro_batch_size, plan.sequence_length, plan.evaluation_batch_size) == (3, 128, 3)
    assert plan.gradient_accumulation_steps == 2
    assert set(plan.phase_peaks) == {"forward", "backward", "optimizer", "evaluate"}
