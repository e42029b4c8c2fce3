"""Simulations of a few layers give the events and FLOPs of simulations of all layers, to the last byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter
from torch import nn

from peftbench.memory.devices import get_device_facts
from peftbench.memory.simulation import simulated_run
from peftbench.memory.simulation.layer_expansion import UnequalLayersError, extrapolate_events
from peftbench.memory.simulation.repeating_layers import KeptLayers, LayerPattern, find_pattern
from peftbench.memory.simulation.simulated_run import RunSize, SimulatedRun, simulate_run
from peftbench.methods import AnyMethod
from peftbench.methods.base import Method
from peftbench.profiler.memory_breakdown import MemoryEvent
from peftbench.recipe.schema import Recipe
from peftbench.timing.operations import sum_flops
from tests.helpers.architectures import EXPERTS, GPT2_KEYS, PLAIN, WINDOW, WITH_HEAD_DIM
from tests.helpers.sweeps import mark_slow
from tests.helpers.workshop import Workshop

NUM_LAYERS = 11
FAMILIES: dict[str, tuple[dict[str, Any], int]] = {
    "gpt2": (GPT2_KEYS | {"n_layer": NUM_LAYERS}, 1),
    "llama": (PLAIN, 1),
    "qwen2": (PLAIN, 1),
    "qwen3": (WITH_HEAD_DIM, 1),
    "mistral": (PLAIN | WINDOW, 1),
    "phi3": (PLAIN, 1),
    "gpt_neox": (PLAIN, 1),
    "opt": (PLAIN | {"ffn_dim": 48, "word_embed_proj_dim": 32}, 1),
    "falcon": (PLAIN, 1),
    "mixtral": (EXPERTS, 1),
    "olmo2": (PLAIN, 1),
    "gemma2": (WITH_HEAD_DIM | WINDOW, 2),
    "cohere2": (PLAIN | WINDOW | {"layer_types": ["sliding_attention", "full_attention"] * 5 + ["full_attention"]}, 2),
}
"""Config keys, and the layers in which the pattern repeats."""
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": {"kind": "full"}},
    "full 8-bit": {"method": {"kind": "full"}, "optimizer": {"kind": "adamw8bit"}},
    "full bf16": {"method": {"kind": "full"}, "optimizer": {"kind": "adamw8bit_bf16"}, "train": {"precision": "bf16"}},
    "full muon": {"method": {"kind": "full"}, "optimizer": {"kind": "muon"}},
    "full adafactor": {"method": {"kind": "full"}, "optimizer": {"kind": "adafactor"}},
    "full galore": {"method": {"kind": "full"}, "optimizer": {"kind": "galore"}},
    "lora": {"method": {"kind": "lora"}},
    "qlora": {"method": {"kind": "lora"}, "model": {"quantization": "nf4"}},
    "dora": {"method": {"kind": "dora"}},
    "prompt tuning": {"method": {"kind": "prompt_tuning", "num_virtual_tokens": 4}},
    "last layer": {"method": {"kind": "last_layer"}},
    "offload": {"method": {"kind": "lora"}, "train": {"activation_offloading": True}},
}
FAST = {
    *((family, "lora", True) for family in ("gpt2", "gemma2")),
    *(("llama", method, False) for method in ("full 8-bit", "qlora", "prompt tuning")),
}
CASES = [
    (family, method, checkpointing) for family in FAMILIES for method in METHODS for checkpointing in (False, True)
]
assert CASES


def build_recipe(
    family: str, method: str, workshop: Workshop, folder: Path, *, checkpointing: bool = False, **parts: Any
) -> Recipe:
    """Return a recipe for a tiny model with ``NUM_LAYERS`` layers."""
    from transformers import AutoConfig

    values = FAMILIES[family][0]
    values = values if "n_layer" in values else values | {"num_hidden_layers": NUM_LAYERS}
    AutoConfig.for_model(family, **values).save_pretrained(folder)
    keys = {name: dict(value) for name, value in METHODS[method].items()} | parts
    attention = "eager" if family == "gemma2" else "sdpa"
    keys["model"] = {"path": str(folder), "attention": attention} | keys.get("model", {})
    keys["train"] = {"precision": "fp16", "gradient_checkpointing": checkpointing} | keys.get("train", {})
    return workshop.recipe(keys.pop("method"), **keys)


def simulate(recipe: Recipe, device: str = "rtx-4090") -> SimulatedRun:
    """Simulate a run with two micro-batches of two rows of 24 tokens, with eight labels each."""
    return simulate_run(recipe, get_device_facts(device).capability, RunSize(2, 24, 8, 2, 4))


def check_equal(few: SimulatedRun, whole: SimulatedRun) -> None:
    """Compare all events, FLOPs and notes."""
    assert whole.num_simulated_layers is None
    assert few.step_flops == whole.step_flops
    assert few.notes == whole.notes
    assert sum_flops(few.operation_counts) == sum_flops(whole.operation_counts)
    assert few.operation_counts.total() == whole.operation_counts.total()
    assert [event._replace(layer=None) for event in few.events] == whole.events


@pytest.mark.parametrize(
    "case", mark_slow([(case,) for case in CASES], lambda case: case[0] in FAST, seed=5, one_in=150)
)
def test_few_layers_give_the_events_of_all_layers(
    case: tuple[str, str, bool], workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storages, their sizes, categories and order, FLOPs, operations and notes are equal."""
    family, method, checkpointing = case
    recipe = build_recipe(family, method, workshop, tmp_path, checkpointing=checkpointing)
    few = simulate(recipe)
    period = FAMILIES[family][1]
    assert few.num_simulated_layers == 4 * period + NUM_LAYERS % period
    monkeypatch.setattr(simulated_run, "find_layer_pattern", lambda *_: None)
    check_equal(few, simulate(recipe))


@pytest.mark.parametrize(
    "method",
    [
        {"kind": "lora", "target_modules": r".*\.(0|5|10)\.self_attn\.q_proj"},
        {"kind": "select", "train": r".*layers\.(2|7)\..*"},
        {"kind": "peft", "type": "LORA", "layers_to_transform": [1, 9]},
    ],
    ids=["a regex with indices", "select", "layers_to_transform"],
)
def test_methods_that_name_layers_are_simulated_whole(
    method: dict[str, Any], workshop: Workshop, tmp_path: Path
) -> None:
    """Layers that a method treats differently do not repeat."""
    recipe = build_recipe("llama", "full", workshop, tmp_path)
    section: Method = TypeAdapter(AnyMethod).validate_python(method)
    assert simulate(recipe.model_copy(update={"method": section})).num_simulated_layers is None


def test_optimizer_that_trains_some_layers_is_simulated_whole(workshop: Workshop, tmp_path: Path) -> None:
    """LISA trains two blocks of all in a step."""
    recipe = build_recipe("llama", "full", workshop, tmp_path, optimizer={"kind": "lisa"})
    assert simulate(recipe).num_simulated_layers is None


class Layer(nn.Module):
    """A layer with one setting."""

    def __init__(self, kind: str, index: int) -> None:
        super().__init__()
        self.kind, self.layer_idx = kind, index


@pytest.mark.parametrize(
    ("kinds", "pattern"),
    [
        ("aaaaa", LayerPattern(0, 1, 0, 5)),
        ("aaaa", None),
        ("baaaaaa", LayerPattern(1, 1, 0, 6)),
        ("abababababa", LayerPattern(0, 2, 1, 5)),
        ("cabababababa", LayerPattern(1, 2, 1, 5)),
        ("aabaabaabaabaabaa", LayerPattern(0, 3, 2, 5)),
        ("abcdefghij", None),
        ("aaaaab", None),
    ],
)
def test_pattern_of_layers(kinds: str, pattern: LayerPattern | None) -> None:
    """The pattern with the fewest simulated layers is found; the index of a layer does not count."""
    assert find_pattern([Layer(kind, index) for index, kind in enumerate(kinds)]) == pattern


def test_kept_layers_of_a_pattern() -> None:
    """The first units, and the last one with its extra layers, are kept, each with the number of its unit."""
    pattern = LayerPattern(extra_first=1, period=2, extra_last=1, num_units=6)
    assert pattern.keep_units(3) == KeptLayers((0, 1, 2, 3, 4, 11, 12, 13), (0, 0, 0, 1, 1, 2, 2, 2))
    assert pattern.keep_units(6).indices == tuple(range(14))
    with pytest.raises(ValueError, match="7 of 6 units"):
        pattern.keep_units(7)


def list_events(num_units: int, sizes: dict[int, int] | None = None) -> list[MemoryEvent]:
    """Return events of a pass in which each unit allocates a storage and releases that of the previous unit."""
    sizes = sizes or {}
    events = [MemoryEvent(0, 10, True, "weights", "outside", None, False)]
    for unit in range(num_units):
        size = sizes.get(unit, 5)
        events.append(MemoryEvent(unit + 1, size, True, "activations", "layer", "forward", True, unit))
        if unit:
            size = sizes.get(unit - 1, 5)
            events.append(MemoryEvent(unit, size, False, "activations", "layer", "forward", True, unit))
    growing = MemoryEvent(num_units + 1, 4 * num_units, True, "temporaries", "stack", "optimizer", True)
    return [*events, growing, growing._replace(is_allocation=False)]


@pytest.mark.parametrize("num_units", [4, 5, 9])
def test_extrapolated_events_of_a_pass(num_units: int) -> None:
    """A released storage is that of the neighbor, and a storage outside of layers grows with their number."""
    expanded = extrapolate_events(list_events(4), list_events(3), num_units)
    assert [event[:7] for event in expanded] == [event[:7] for event in list_events(num_units)]


@pytest.mark.parametrize("size_by_unit", [{1: 6}, {2: 6}, {0: 6}, {3: 6}])
def test_units_of_other_sizes_are_refused(size_by_unit: dict[int, int]) -> None:
    """A unit whose storages differ from those of its neighbor does not repeat."""
    with pytest.raises(UnequalLayersError):
        extrapolate_events(list_events(4, size_by_unit), list_events(3), 6)
