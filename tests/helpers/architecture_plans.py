"""Run and plan one training step of a tiny model of each architecture, and compare their live bytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftbench.data.sources import Files
from peftbench.errors import EstimateUnavailableError, UnsupportedModelError
from peftbench.memory.devices import get_device_facts
from peftbench.memory.simulation.step import MemorySimulation
from peftbench.methods.base import Method
from peftbench.methods.full import Full
from peftbench.methods.last_layer import LastLayer
from peftbench.methods.lora import Lora
from peftbench.methods.prompt_tuning import PromptTuning
from peftbench.recipe.schema import Profile, Recipe
from peftbench.training.trial import try_method
from tests.helpers.architectures import EXPERTS, HEADS, HIDDEN, LAYERS, PLAIN, TINY_CONFIGS, WINDOW
from tests.helpers.records import count_labels_per_row
from tests.helpers.workshop import Workshop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

METHODS: dict[str, Method] = {
    "full": Full(),
    "lora": Lora(r=2),
    "lora, peft's targets": Lora(r=2, target_modules=None),
    "prompt tuning": PromptTuning(num_virtual_tokens=4),
    "last layer": LastLayer(),
}
_RECURRENT: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, dict[str, Any]] = TINY_CONFIGS | {
    "gpt_neo": {
        "hidden_size": HIDDEN,
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_oss": EXPERTS | {"head_dim": 8},
    "jamba": EXPERTS | {"mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "mamba": _RECURRENT | {"state_size": 8},
    "mamba2": _RECURRENT | {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2},
    "mixtral, window": EXPERTS | WINDOW,
    "opt, narrow embedding": PLAIN | {"ffn_dim": HIDDEN, "word_embed_proj_dim": 16},
    "qwen3_next": EXPERTS
    | {
        "head_dim": 8,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "rwkv": _RECURRENT | {"attention_hidden_size": HIDDEN, "context_length": 64},
}
"""The shared configs and some that only this sweep uses, by model type and variant."""
CASES = [case for case in CONFIGS if case != "llama, dynamic RoPE"]  # its context is shorter than the rows
ROWS, WIDTH = 2, 48
TOLERANCE_BYTES = 64
"""Allowed difference: small index tensors differ on the meta device (Falcon, Phi-3 with LongRoPE)."""
EXACT, UNPLANNED, REFUSED = "exact", "not planned", "refused"


def write_tiny_config(case: str, folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Write the config of a tiny model with the tokenizer's vocabulary, and the tokenizer, to ``folder``."""
    from transformers import AutoConfig

    values: dict[str, Any] = CONFIGS[case] | {"vocab_size": len(tokenizer)}
    AutoConfig.for_model(case.split(",", maxsplit=1)[0], **values).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build_recipe(workshop: Workshop, source: Files, folder: Path, method: Method) -> Recipe:
    """Return a recipe of three steps with random weights and the memory breakdown in the third.

    All examples of ``source`` have the same number of labels.
    """
    return workshop.recipe(
        method,
        model={"path": str(folder), "init": "random", "attention": "auto"},
        data={"source": source, "padding": "max_length", "max_length": WIDTH},
        train={"steps": 3, "global_batch_size": ROWS},
        evaluate={"batch_size": ROWS},
        profile=Profile(untimed_steps=2, memory_breakdown=True),
    )


def plan_on_gpu(workshop: Workshop, source: Files, folder: Path, *, device: str, precision: str, padding: str) -> None:
    """Simulate a LoRA step on a GPU.

    Raises:
        PeftbenchError: the architecture cannot be planned.
    """
    recipe = build_recipe(workshop, source, folder, METHODS["lora"])
    updates = {
        "train": recipe.train.model_copy(update={"precision": precision}),
        "data": recipe.data.model_copy(update={"padding": padding}),
    }
    with MemorySimulation(recipe.model_copy(update=updates), get_device_facts(device).capability, 1) as plan:
        plan.simulate_training(ROWS, WIDTH, 8)


def compare_run_and_plan(workshop: Workshop, source: Files, folder: Path, method: Method) -> tuple[str, str]:
    """Return the outcome and a reason: EXACT, UNPLANNED (it runs) or REFUSED (both, with the same error message).

    Raises:
        AssertionError: the plan differs from the run, or only one of them refuses.
    """
    recipe = build_recipe(workshop, source, folder, method)
    run_refusal = plan_refusal = ""
    record, plan = None, None
    try:
        record = workshop.run(recipe)
    except UnsupportedModelError as error:
        run_refusal = str(error)
    try:
        with MemorySimulation(recipe, get_device_facts("cpu").capability, 1) as plan:
            plan.simulate_training(ROWS, WIDTH, 8 if record is None else count_labels_per_row(record, ROWS))
    except UnsupportedModelError as error:
        plan_refusal = str(error)
    except EstimateUnavailableError as error:
        assert record is not None
        return UNPLANNED, str(error)
    assert plan_refusal == run_refusal
    if record is None or plan is None:
        return REFUSED, plan_refusal
    assert record.memory_breakdown is not None
    difference = record.memory_breakdown.peak_bytes - plan.memory_tracker.find_peak().nbytes
    assert abs(difference) <= TOLERANCE_BYTES, difference
    trial = try_method(method, plan.loaded_model.model.config)
    assert (plan.counted_flops is not None) == (trial.flops_problem is not None and trial.flops_are_counted)
    if plan.counted_flops is not None:
        assert record.flops.counted_step is not None
        assert plan.counted_flops == record.flops.counted_step.counted_flops
    return EXACT, ""
