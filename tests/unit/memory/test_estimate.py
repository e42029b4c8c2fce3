"""Memory plans from a model config without weights, for every method and optimizer, and their verdicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peftbench.common.units import format_bytes, parse_size
from peftbench.errors import BudgetError, DeviceError, EstimateUnavailableError, ModelError, PrecisionError
from peftbench.memory.advisor import AdviceRequest
from peftbench.memory.devices import UNKNOWN_DEVICE, get_device_facts, get_facts_by_torch_name, load_devices
from peftbench.memory.estimate import estimate
from peftbench.memory.label_counts import LabelCount
from peftbench.memory.plan import Plan
from peftbench.memory.replay import replay_allocator
from peftbench.memory.simulation.step import MemorySimulation
from peftbench.methods.base import Method
from peftbench.methods.baselines import ZeroShot
from peftbench.methods.full import Full
from peftbench.methods.last_layer import LastLayer
from peftbench.methods.lora import Lora
from peftbench.methods.prompt_tuning import PromptTuning
from peftbench.methods.select_presets import LastBlocks
from peftbench.optim import OPTIMIZERS
from peftbench.recipe.schema import Recipe
from peftbench.report.tables.memory_plan import format_plan
from tests.helpers.methods import method_for, one_method_fast
from tests.helpers.models import ARCHITECTURES
from tests.helpers.sweeps import mark_others_slow
from tests.helpers.workshop import Workshop

MIB = 2**20
FAST = {("gpt2_tied", "fp32"), ("llama_untied", "bf16"), ("llama_tied", "fp16")}
"""Each architecture and each precision once; other combinations are slow."""
OPTIMIZER_CLASSES: dict[str, Any] = dict(OPTIMIZERS)


@pytest.fixture
def make_plan(workshop: Workshop, tmp_path: Path) -> Any:
    """Return a function that plans a method from a folder that has only a config."""

    def plan_method(method: Method, budget: int | None = None, architecture: str = "gpt2_tied", **parts: Any) -> Plan:
        folder = tmp_path / "config_only"
        folder.mkdir(exist_ok=True)
        config = workshop.base_folder(architecture) / "config.json"
        (folder / "config.json").write_text(config.read_text(encoding="utf-8"), encoding="utf-8")
        model = {"path": str(folder)} | parts.pop("model", {})
        recipe: Recipe = workshop.recipe(method, model=model, **parts)
        return estimate(recipe, UNKNOWN_DEVICE, "a GPU", budget)

    return plan_method


@pytest.mark.parametrize("method", [LastLayer(), LastBlocks()], ids=["head", "block"])
def test_feature_cache_is_planned_as_empty(method: Method, make_plan: Any) -> None:
    """The plan is that of the first epoch, which needs the most memory; a note states it."""
    plain, cached = (make_plan(method, train={"feature_cache": dtype}) for dtype in (None, "bf16"))
    assert cached.phase_peaks == plain.phase_peaks
    assert cached.process_bytes == plain.process_bytes
    assert set(cached.notes) - set(plain.notes) == {
        "assumes steps that compute the frozen part; steps that read the feature cache need less"
    }


@one_method_fast("prompt_tuning", "full")
@pytest.mark.parametrize(
    ("architecture", "precision"),
    [
        pytest.param(architecture, precision, marks=() if (architecture, precision) in FAST else pytest.mark.slow)
        for architecture in ARCHITECTURES
        for precision in ("fp32", "bf16", "fp16")
    ],
)
def test_plan_has_every_phase(method: Method, architecture: str, precision: str, make_plan: Any) -> None:
    """Training, evaluation and generation are planned; live <= allocated <= reserved bytes."""
    plan = make_plan(
        method, architecture=architecture, train={"precision": precision}, evaluate={"metrics": None, "batch_size": 3}
    )
    assert set(plan.phase_peaks) == {"forward", "backward", "optimizer", "evaluate", "generate"}
    for part in plan.phase_peaks.values():
        assert 0 < part.live_bytes == sum(part.live_bytes_by_category.values())
        assert part.live_bytes <= part.allocated_bytes <= plan.reserved_bytes
    assert plan.peak.allocated_bytes == max(part.allocated_bytes for part in plan.phase_peaks.values())
    assert plan.process_bytes[0] > plan.reserved_bytes
    assert any("uncalibrated" in note for note in plan.notes)


SMALL_KEYS: dict[str, dict[str, int]] = {"galore": {"rank": 8}, "apollo": {"rank": 8}, "lisa": {"num_blocks": 1}}
SIMULATED = sorted(set(OPTIMIZERS) - {"paged_adamw8bit", "deepspeed_cpu_adam"})


@pytest.mark.parametrize(
    "name", mark_others_slow({n: n for n in SIMULATED}, "adamw8bit", "adafactor", "galore", "sgd", "lora_fa")
)
def test_optimizer_state_bytes_match_closed_form(name: str, workshop: Workshop) -> None:
    """Simulated states equal the closed form; some optimizers have step counters on the CPU, 4 bytes per tensor."""
    optimizer = OPTIMIZER_CLASSES[name](**SMALL_KEYS.get(name, {}))
    recipe = workshop.recipe(
        method_for(optimizer),
        optimizer=optimizer,
        train={"precision": "bf16" if optimizer.weight_dtype == "bf16" else "fp32", "global_batch_size": 2},
    )
    with MemorySimulation(recipe, UNKNOWN_DEVICE.capability, 1) as simulation:
        simulation.simulate_training(2, 16, 4)
        groups = simulation.training.optimizer.param_groups
    state_bytes = (
        replay_allocator(simulation.memory_tracker.iter_events())
        .peak_by_phase["optimizer"]
        .live_bytes_by_category.get("optimizer_state", 0)
    )
    steps = 4 * sum(len(group["params"]) for group in groups)
    assert state_bytes == optimizer.state_bytes(groups) - steps * (
        name in {"adafactor", "adamw_bf16", "adamw8bit_bf16"}
    )


def test_accumulation_holds_gradients_in_the_forward_pass(make_plan: Any) -> None:
    """One micro-batch has no gradients in the forward pass; smaller micro-batches have fewer activations."""
    single = make_plan(Full(), train={"global_batch_size": 8, "micro_batch_size": 8})
    accumulated = make_plan(Full(), train={"global_batch_size": 8, "micro_batch_size": 4})
    assert "gradients" not in single.phase_peaks["forward"].live_bytes_by_category
    assert accumulated.phase_peaks["forward"].live_bytes_by_category["gradients"] > 0
    assert (
        accumulated.phase_peaks["forward"].live_bytes_by_category["activations"]
        < single.phase_peaks["forward"].live_bytes_by_category["activations"]
    )
    assert (accumulated.micro_batch_size, accumulated.gradient_accumulation_steps) == (4, 2)


def test_checkpointing_and_bf16_reduce_activations(make_plan: Any) -> None:
    """Activations take less than half the bytes with checkpointing, and less than 80 % with bf16."""
    plain, checkpointed, in_bf16 = (
        make_plan(
            Full(), train={"gradient_checkpointing": checkpointing, "precision": precision}, evaluate={"batch_size": 1}
        )
        .phase_peaks["forward"]
        .live_bytes_by_category["activations"]
        for checkpointing, precision in ((False, "fp32"), (True, "fp32"), (False, "bf16"))
    )
    assert checkpointed < 0.5 * plain
    assert in_bf16 < 0.8 * plain


def test_pad_to_multiple_of_widens_rows(make_plan: Any) -> None:
    """Rows of 48 tokens are padded to 64, including virtual tokens; this also applies to micro_batch_tokens."""
    padded, longer = (make_plan(Full(), data=data) for data in ({"pad_to_multiple_of": 32}, {"max_length": 64}))
    assert (
        (padded.sequence_length, padded.phase_peaks)
        == (longer.sequence_length, longer.phase_peaks)
        == (64, longer.phase_peaks)
    )
    assert make_plan(PromptTuning(num_virtual_tokens=5), data={"pad_to_multiple_of": 32}).sequence_length == 59
    assert make_plan(Full(), data={"pad_to_multiple_of": 32}, train={"micro_batch_tokens": 128}).micro_batch_size == 2


def test_resident_memory_adds_libraries_on_cpu_only(workshop: Workshop) -> None:
    """The minimum adds the smallest libraries; the maximum the largest ones and as much again for freed blocks."""
    recipe = workshop.recipe(Full())
    assert estimate(recipe, UNKNOWN_DEVICE, "a GPU").resident_bytes is None
    plan = estimate(recipe, get_device_facts("cpu"), "cpu")
    low, high = plan.process_bytes
    assert plan.resident_bytes == (low + 450 * MIB, 2 * high + 1024 * MIB)
    assert f"set a container's limit to {plan.resident_bytes[1] / MIB:,.0f} MiB" in format_plan(plan)
    two = format_plan(plan.model_copy(update={"num_processes": 2}))
    assert f"set a container's limit to {2 * plan.resident_bytes[1] / MIB:,.0f} MiB" in two


def test_verdict_by_budget(make_plan: Any) -> None:
    """The recipe fits at the upper bound, does not fit below the lower one, and is too close to say in between."""
    plan = make_plan(Full())
    low, high = plan.process_bytes
    verdicts = {}
    for budget in (high, high - 1, low, low - 40 * MIB, plan.peak.live_bytes_by_category["weights"] + 300 * MIB):
        budgeted = make_plan(Full(), budget=budget)
        verdicts[budget] = budgeted.verdict
        assert budgeted.margin_bytes == (budget - high, budget - low)
    assert verdicts[high] == "fits"
    assert verdicts[high - 1] == verdicts[low] == "too close to say"
    assert verdicts[low - 40 * MIB] == "does not fit"


def test_unmodeled_recipes_are_refused(workshop: Workshop) -> None:
    """Each message names the reason."""
    refused: tuple[tuple[Method, dict[str, Any], str], ...] = (
        (Lora(), {"model": {"quantization": "int8"}}, "int8 outliers depends on the weights"),
        (ZeroShot(), {}, "zero_shot trains nothing"),
    )
    for method, changes, message in refused:
        with pytest.raises(EstimateUnavailableError, match=message):
            estimate(workshop.recipe(method, **changes), UNKNOWN_DEVICE, "a GPU")


def test_paged_states_lower_the_minimum(make_plan: Any) -> None:
    """The maximum equals that of unpaged states, the minimum excludes the states."""
    plain = make_plan(Full(), optimizer=OPTIMIZERS["adamw8bit"](kind="adamw8bit"))
    paged = make_plan(Full(), optimizer=OPTIMIZERS["paged_adamw8bit"](kind="paged_adamw8bit"))
    states = plain.peak.live_bytes_by_category["optimizer_state"]
    assert paged.phase_peaks == plain.phase_peaks
    assert paged.process_bytes == (plain.process_bytes[0] - states, plain.process_bytes[1])
    assert any(f"{format_bytes(states)} of optimizer state" in note for note in paged.notes)


@pytest.mark.slow
def test_offloaded_activations_leave_the_device(make_plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Except small activations and those fetched for the backward pass; weights do not change.

    Few tokens have labels, so that the gradient of the logits, which stays on the device, is small.
    """
    monkeypatch.setattr("peftbench.memory.estimate.count_labeled_tokens", lambda *_: LabelCount(64, "few"))
    shape = {"path": "openai-community/gpt2"}
    plain, offloaded = (
        make_plan(
            Full(),
            model=shape,
            train={"activation_offloading": offload, "global_batch_size": 2},
            evaluate={"batch_size": 1},
            data={"max_length": 512},
        )
        for offload in (False, True)
    )
    kinds = [plan.phase_peaks["backward"].live_bytes_by_category for plan in (plain, offloaded)]
    assert kinds[1].get("activations", 0) < 0.1 * kinds[0]["activations"]
    assert kinds[1]["weights"] == kinds[0]["weights"]
    assert offloaded.peak.allocated_bytes < plain.peak.allocated_bytes


def test_budget_below_the_weights_gives_a_plan(make_plan: Any) -> None:
    """The verdict is "does not fit", and the margin states by how much."""
    plan = make_plan(Full(), budget=1000)
    assert plan.verdict == "does not fit"
    assert plan.margin_bytes == (1000 - plan.process_bytes[1], 1000 - plan.process_bytes[0])


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16GiB", 16 * 2**30),
        ("16GB", 16 * 10**9),
        ("15.5 GiB", int(15.5 * 2**30)),
        ("1048576", 2**20),
        ("12gib", 12 * 2**30),
        ("16 GB", 16 * 10**9),
        ("15.5GiB", int(15.5 * 2**30)),
        ("16384MB", 16384 * 10**6),
    ],
)
def test_parse_size_reads_units(text: str, size: int) -> None:
    """Binary and decimal prefixes have different factors."""
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["much", "lots", "-4GiB", "", "16GiBs", "-3GiB", "0", "16,384MiB", "15,5GiB", "80%", "16Gbit", "16GiB/2"]
)
def test_invalid_size_is_refused(text: str) -> None:
    """The error has an example of a valid size."""
    with pytest.raises(BudgetError, match=r"write e\.g\. 16GiB"):
        parse_size(text)


def test_device_profiles() -> None:
    """Each profile is complete and has a source; an unknown name suggests the nearest one and --budget."""
    assert len(load_devices()) >= 21
    gpus = [facts for facts in load_devices().values() if facts.device_type == "cuda"]
    assert len(gpus) == len(load_devices()) - 1
    for facts in gpus:
        assert 10 * 2**30 < facts.memory[0] <= facts.memory[1] < 200 * 2**30
        assert facts.context[0] <= facts.context[1]
        assert facts.workspaces[0] <= facts.workspaces[1]
        assert facts.compute_capability is not None
        assert (5, 0) < facts.compute_capability < (20, 0)
        assert all((facts.memory_source, facts.overhead_source, facts.compute_capability_source))
    with pytest.raises(DeviceError, match=r"did you mean 'a100-40gb'.*--budget 16GiB"):
        get_device_facts("a100-40")


def test_unknown_device_keeps_its_compute_capability() -> None:
    """A GPU without a profile selects the kernels of its own generation."""
    facts = get_facts_by_torch_name("NVIDIA GeForce RTX 2080 Ti", (7, 5))
    assert facts.compute_capability == (7, 5)
    assert not facts.capability.has_bf16
    assert not facts.is_assumed
    assert get_facts_by_torch_name("Tesla T4", (7, 5)) == get_device_facts("t4")
    assert get_facts_by_torch_name("a GPU without capability") == UNKNOWN_DEVICE


def test_advice_is_for_the_compute_capability_of_the_run(workshop: Workshop) -> None:
    """The process that plans has no GPU to ask."""
    request = AdviceRequest(
        recipe=workshop.recipe(Lora(r=2)), budget_bytes=2**30, device_name="a GPU", compute_capability=(7, 5)
    )
    assert request.build_target().facts.compute_capability == (7, 5)


def test_json_round_trip(make_plan: Any) -> None:
    """A plan equals the plan read from its JSON."""
    plan = make_plan(Full())
    assert Plan(**json.loads(plan.model_dump_json())) == plan


def test_model_that_reads_tensor_values_is_refused(make_plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the module."""
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

    forward = GPT2MLP.forward

    def forward_with_value(self: Any, hidden_states: Any) -> Any:
        return forward(self, hidden_states) * hidden_states.mean().item()

    monkeypatch.setattr(GPT2MLP, "forward", forward_with_value)
    with pytest.raises(
        EstimateUnavailableError, match=r"transformer\.h\.0\.mlp \(gpt2\) cannot be simulated without tensor"
    ):
        make_plan(Full())


def test_other_errors_propagate(make_plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that is not about missing values is raised unchanged."""
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

    def failing_forward(self: Any, hidden_states: Any) -> Any:
        raise RuntimeError("something else")

    monkeypatch.setattr(GPT2MLP, "forward", failing_forward)
    with pytest.raises(RuntimeError, match="something else"):
        make_plan(Full())


def test_device_without_bf16_is_refused(workshop: Workshop) -> None:
    """The run itself refuses it too."""
    with pytest.raises(PrecisionError, match=r"Tesla T4 does not support train.precision=bf16; use fp16 or fp32"):
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
"""Peak MiB of tensors in a step of GPT-2 small with 6 x 1,024 tokens, AdamW and unfused GELU, from another trace.

That trace decomposes dropout as torch does on CPU: a mask has the type of the activation. CUDA's kernel saves one byte
per value.
"""


@pytest.mark.slow
@pytest.mark.parametrize(("method", "precision"), PUBLISHED)
def test_gpt2_small_matches_independent_trace(method: str, precision: str, workshop: Workshop) -> None:
    """The simulated peak, with dropout masks as the trace has them, is within 0.5 % of the traced one."""
    by_name: Method = {
        "full": Full(),
        "lora": Lora(r=8, target_modules=None),
        "prompt_tuning": PromptTuning(num_virtual_tokens=20),
        "last_layer": LastLayer(),
    }[method]
    recipe = workshop.recipe(
        by_name,
        model={"path": "openai-community/gpt2", "fused_gelu": False, "dtype": "fp32"},
        train={"precision": precision, "global_batch_size": 6, "logits": "all"},
        data={"padding": "longest"},
    )
    with MemorySimulation(recipe, UNKNOWN_DEVICE.capability, 1) as simulation:
        simulation.simulate_training(6, 1024, 1023)
    masks = 0 if method == "last_layer" else 2 * 12  # two per layer; a frozen backbone has none
    extra_mask_bytes = masks * 6 * 1024 * 768 * ({"fp32": 4, "bf16": 2}[precision] - 1)
    peak = simulation.memory_tracker.find_peak().nbytes + extra_mask_bytes
    assert peak / MIB == pytest.approx(PUBLISHED[method, precision], rel=0.005)


def test_remote_code_is_not_run(tmp_path: Path, workshop: Workshop) -> None:
    """A config that needs custom code is refused."""
    folder = tmp_path / "remote"
    folder.mkdir()
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()", encoding="utf-8")
    with pytest.raises(ModelError):
        estimate(workshop.recipe(Full(), model={"path": str(folder)}), UNKNOWN_DEVICE, "a GPU")
    assert not (tmp_path / "ran").exists()
