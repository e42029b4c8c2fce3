"""A plan is made from a config alone, for every method and optimizer, and says fits only where it must."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peftbench.common.units import parse_size
from peftbench.errors import BudgetError, DeviceError, EstimateUnavailableError, ModelError, PrecisionError
from peftbench.memory.devices import UNKNOWN_DEVICE, get_device_facts, load_devices
from peftbench.memory.estimate import estimate
from peftbench.memory.plan import Plan
from peftbench.memory.replay import replay_allocator
from peftbench.memory.simulation.step import MemorySimulation
from peftbench.methods.base import Method
from peftbench.methods.baselines import ZeroShot
from peftbench.methods.full import Full
from peftbench.methods.last_layer import LastLayer
from peftbench.methods.lora import Lora
from peftbench.methods.prompt_tuning import PromptTuning
from peftbench.optim import OPTIMIZERS
from peftbench.recipe.schema import Recipe
from tests.helpers.methods import every_architecture, every_method
from tests.helpers.workshop import Workshop

MIB = 2**20
KINDS: dict[str, Any] = dict(OPTIMIZERS)


@pytest.fixture
def planned(workshop: Workshop, tmp_path: Path) -> Any:
    """Given a method and knobs, its plan, made where there is a config and nothing else."""

    def made(method: Method, budget: int | None = None, architecture: str = "gpt2_tied", **parts: Any) -> Plan:
        folder = tmp_path / "config_alone"
        folder.mkdir(exist_ok=True)
        config = workshop.base_folder(architecture) / "config.json"
        (folder / "config.json").write_text(config.read_text(encoding="utf-8"), encoding="utf-8")
        model = {"path": str(folder)} | parts.pop("model", {})
        recipe: Recipe = workshop.recipe(method, model=model, **parts)
        return estimate(recipe, UNKNOWN_DEVICE, "a GPU", budget)

    return made


def test_a_trunk_cache_is_planned_as_if_it_were_empty(planned: Any) -> None:
    """The first epoch takes the most, and the plan says that it is that."""
    plain, kept = (planned(LastLayer(), train={"feature_cache": stored}) for stored in (None, "bf16"))
    assert kept.parts == plain.parts
    assert kept.process_bytes == plain.process_bytes
    assert set(kept.notes) - set(plain.notes) == {
        "for steps that compute the trunk; those that read its states from the trunk cache take less"
    }


@every_method
@every_architecture
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_method_has_a_plan(method: Method, architecture: str, precision: str, planned: Any) -> None:
    """With training, evaluation and generation in it; reserved is no less than allocated, nor that than live."""
    plan = planned(
        method, architecture=architecture, train={"precision": precision}, evaluate={"generate": True, "batch_size": 3}
    )
    assert set(plan.parts) == {"forward", "backward", "optimizer", "evaluate", "generate"}
    for part in plan.parts.values():
        assert 0 < part.live_bytes == sum(part.live_by_kind.values())
        assert part.live_bytes <= part.allocated_bytes <= plan.reserved_bytes
    assert plan.peak.allocated_bytes == max(part.allocated_bytes for part in plan.parts.values())
    assert plan.process_bytes[0] > plan.reserved_bytes
    assert any("uncalibrated" in note for note in plan.notes)


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"paged_adamw8bit", "deepspeed_cpu_adam"}))
def test_every_optimizer_s_states(name: str, workshop: Workshop) -> None:
    """As many bytes as its closed form says; some keep the number of the step in the CPU's memory, 4 bytes a tensor."""
    kind = KINDS[name](**({"rank": 8} if name in {"galore", "apollo"} else {}))
    recipe = workshop.recipe(
        Full(),
        optimizer=kind,
        train={"precision": "bf16" if kind.weights == "bf16" else "fp32", "global_batch_size": 2},
    )
    with MemorySimulation(recipe, "cuda", 1) as rehearsal:
        rehearsal.simulate_training(2, 16, 4)
        groups = rehearsal.training.optimizer.param_groups
    held = (
        replay_allocator(rehearsal.memory_tracker.iter_events())
        .peak_by_phase["optimizer"]
        .live_bytes_by_category["optimizer_state"]
    )
    steps = 4 * sum(len(group["params"]) for group in groups)
    assert held == kind.state_bytes(groups) - steps * (name in {"adafactor", "adamw_bf16", "adamw8bit_bf16"})


def test_accumulation_keeps_gradients_through_the_forward_pass(planned: Any) -> None:
    """With one micro-batch there are none in it; smaller micro-batches hold fewer activations."""
    whole = planned(Full(), train={"global_batch_size": 8, "micro_batch_size": 8})
    halves = planned(Full(), train={"global_batch_size": 8, "micro_batch_size": 4})
    assert "gradients" not in whole.parts["forward"].live_by_kind
    assert halves.parts["forward"].live_by_kind["gradients"] > 0
    assert halves.parts["forward"].live_by_kind["activations"] < whole.parts["forward"].live_by_kind["activations"]
    assert (halves.rows, halves.micro_batches) == (4, 2)


def test_checkpointing_and_precision_hold_less(planned: Any) -> None:
    """What the techniques are for."""
    plain, again, half = (
        planned(Full(), train={"gradient_checkpointing": on, "precision": precision}, evaluate={"batch_size": 1})
        .parts["forward"]
        .live_by_kind["activations"]
        for on, precision in ((False, "fp32"), (True, "fp32"), (False, "bf16"))
    )
    assert again < 0.5 * plain
    assert half < 0.8 * plain


def test_rows_of_a_multiple_are_planned_as_wide_as_they_come(planned: Any) -> None:
    """48 tokens to a multiple of 32 are 64, soft tokens among them, and in a budget of tokens too."""
    wide, plain = (planned(Full(), data=data) for data in ({"pad_to_multiple_of": 32}, {"max_length": 64}))
    assert (wide.width, wide.parts) == (plain.width, plain.parts) == (64, plain.parts)
    assert planned(PromptTuning(num_virtual_tokens=5), data={"pad_to_multiple_of": 32}).width == 59
    assert planned(Full(), data={"pad_to_multiple_of": 32}, train={"micro_batch_tokens": 128}).rows == 2


def test_the_verdict(planned: Any) -> None:
    """Fits at the most that it may take, not at less than what is allocated, and between is too close to say."""
    plan = planned(Full())
    low, high = plan.process_bytes
    said = {}
    for budget in (high, high - 1, low, low - 40 * MIB, plan.peak.live_by_kind["weights"] + 300 * MIB):
        made = planned(Full(), budget=budget)
        said[budget] = made.verdict
        assert made.margin_bytes == (budget - high, budget - low)
    assert said[high] == "fits"
    assert said[high - 1] == said[low] == "too close to say"
    assert said[low - 40 * MIB] == "does not fit"


def test_what_is_not_predicted_is_said(workshop: Workshop) -> None:
    """And no figure is given instead."""
    refused: tuple[tuple[Method, dict[str, Any], str], ...] = (
        (Lora(), {"model": {"quantization": "int8"}}, "an int8 base depend on its values"),
        (Full(), {"model": {"attention": "flash_attention_2"}}, "flash_attention_2 is not predicted"),
        (ZeroShot(), {}, "zero_shot trains nothing"),
    )
    for method, changes, said in refused:
        with pytest.raises(EstimateUnavailableError, match=said):
            estimate(workshop.recipe(method, **changes), UNKNOWN_DEVICE, "a GPU")


def test_paged_states_may_be_elsewhere(planned: Any) -> None:
    """At most as states that are not paged, at least without them, and between is too close to say."""
    plain = planned(Full(), optimizer=OPTIMIZERS["adamw8bit"](kind="adamw8bit"))
    paged = planned(Full(), optimizer=OPTIMIZERS["paged_adamw8bit"](kind="paged_adamw8bit"))
    states = plain.peak.live_by_kind["optimizer_state"]
    assert paged.parts == plain.parts
    assert paged.process_bytes == (plain.process_bytes[0] - states, plain.process_bytes[1])
    assert any(f"{states:,} bytes of states" in note for note in paged.notes)


def test_offloaded_activations_are_not_on_the_device(planned: Any) -> None:
    """But for small ones, and what is brought back for the backward pass; all else is as it was."""
    shape = {"path": "openai-community/gpt2"}
    here, away = (
        planned(
            Full(),
            model=shape,
            train={"activation_offloading": offload, "global_batch_size": 2},
            evaluate={"batch_size": 1},
            data={"max_length": 512},
        )
        for offload in (False, True)
    )
    kinds = [plan.parts["backward"].live_by_kind for plan in (here, away)]
    assert kinds[1].get("activations", 0) < 0.1 * kinds[0]["activations"]
    assert kinds[1]["weights"] == kinds[0]["weights"]
    assert away.peak.allocated_bytes < here.peak.allocated_bytes


def test_a_budget_below_the_weights(planned: Any) -> None:
    """No search for what cannot be."""
    with pytest.raises(BudgetError, match=r"1,000 bytes do not hold the .* of the weights alone"):
        planned(Full(), budget=1000)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16GiB", 16 * 2**30),
        ("16GB", 16 * 10**9),
        ("15.5 GiB", int(15.5 * 2**30)),
        ("1048576", 2**20),
        ("12gib", 12 * 2**30),
    ],
)
def test_sizes(text: str, size: int) -> None:
    """Binary and decimal prefixes are told apart."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["much", "", "16GiBs", "-3GiB", "0"])
def test_no_sizes(text: str) -> None:
    """One sentence, with how to write it."""
    with pytest.raises(BudgetError, match="write it as 16GiB"):
        parse_size(text)


def test_devices() -> None:
    """Each file is whole and says where its memory is from; another name gives the nearest and the way without."""
    assert len(load_devices()) >= 9
    gpus = [facts for facts in load_devices().values() if facts.device_type == "cuda"]
    assert len(gpus) == len(load_devices()) - 1
    for facts in gpus:
        assert 10 * 2**30 < facts.memory < 200 * 2**30
        assert facts.memory_source
        assert facts.context[0] <= facts.context[1]
    with pytest.raises(DeviceError, match=r"give --budget .*did you mean 'a100-40gb'"):
        get_device_facts("a100-40")


def test_json_can_be_read_again(planned: Any) -> None:
    """As a script would."""
    plan = planned(Full())
    assert Plan(**json.loads(plan.model_dump_json())) == plan


def test_a_model_that_needs_values(planned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No figure, and the module by its name."""
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

    forward = GPT2MLP.forward

    def looks(self: Any, hidden_states: Any) -> Any:
        return forward(self, hidden_states) * hidden_states.mean().item()

    monkeypatch.setattr(GPT2MLP, "forward", looks)
    with pytest.raises(
        EstimateUnavailableError, match=r"transformer\.h\.0\.mlp \(gpt2\) cannot be rehearsed without values"
    ):
        planned(Full())


def test_a_fault_of_the_program_is_not_told_as_the_model_s(planned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that is not of missing values goes on as it is."""
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

    def broken(self: Any, hidden_states: Any) -> Any:
        raise RuntimeError("something else")

    monkeypatch.setattr(GPT2MLP, "forward", broken)
    with pytest.raises(RuntimeError, match="something else"):
        planned(Full())


def test_a_device_without_the_precision(workshop: Workshop) -> None:
    """As the run itself would be refused there."""
    with pytest.raises(PrecisionError, match=r"bf16 is not there on Tesla T4; use fp16 or fp32"):
        estimate(workshop.recipe(Full(), train={"precision": "bf16"}), get_device_facts("t4"), "t4")


PUBLISHED = {
    ("full", "fp32"): 11496,
    ("lora", "fp32"): 9419,
    ("prompt_tuning", "fp32"): 9404,
    ("last_layer", "fp32"): 4468,
    ("full", "bf16"): 9995,
    ("lora", "bf16"): 8462,
    ("prompt_tuning", "bf16"): 8539,
    ("last_layer", "bf16"): 4459,
}
"""MiB of tensors at the peak of a step of GPT-2 small over 6 x 1,024 tokens with AdamW, by another trace than this
estimator's, with a GELU that is not fused."""


@pytest.mark.slow
@pytest.mark.parametrize(("method", "precision"), PUBLISHED)
def test_gpt2_small_as_it_was_traced_before(method: str, precision: str, workshop: Workshop) -> None:
    """Within one per cent."""
    kind: Method = {
        "full": Full(),
        "lora": Lora(r=8),
        "prompt_tuning": PromptTuning(num_virtual_tokens=20),
        "last_layer": LastLayer(),
    }[method]
    recipe = workshop.recipe(
        kind,
        model={"path": "openai-community/gpt2", "fused_gelu": False},
        train={"precision": precision, "global_batch_size": 6, "logits": "all"},
        data={"padding": "longest"},
    )
    with MemorySimulation(recipe, "cuda", 1) as rehearsal:
        rehearsal.simulate_training(6, 1024, 1023)
    assert rehearsal.memory_tracker.find_peak().nbytes / MIB == pytest.approx(PUBLISHED[method, precision], rel=0.01)


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path, workshop: Workshop) -> None:
    """Unless the user asks; the config of a model that needs its own code is refused."""
    folder = tmp_path / "remote"
    folder.mkdir()
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()", encoding="utf-8")
    with pytest.raises(ModelError):
        estimate(workshop.recipe(Full(), model={"path": str(folder)}), UNKNOWN_DEVICE, "a GPU")
    assert not (tmp_path / "ran").exists()
