"""Every setting of this benchmark. Imports nothing that could start CUDA."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from peftbench.common.schema import ConfigSection

Precision = Literal["fp32", "bf16"]
Kind = Literal["cpu", "cuda"]


class Case(ConfigSection):
    """A method, and the epoch that is timed."""

    method: str
    """peftbench's name of the method."""
    later_epoch: bool = False
    """Time the second epoch over the same few examples instead of the first."""
    title: str


CASES = {
    "full": Case(method="full", title="full"),
    "lora": Case(method="lora", title="LoRA"),
    "prompt_tuning": Case(method="prompt_tuning", title="prompt tuning"),
    "last_layer": Case(method="last_layer", title="last layer, first epoch"),
    "last_layer_epoch2": Case(method="last_layer", later_epoch=True, title="last layer, from the second epoch on"),
}

OURS = "peftbench"
STUDY = "hf_study"
ARMS = {
    STUDY: "HF Trainer as the study ran it",
    "hf_best": "HF Trainer, its best flags",
    "trl_default": "TRL SFTTrainer, its defaults",
    "trl_best": "TRL SFTTrainer, its best settings",
    OURS: "peftbench",
}
NEEDS_TRL = frozenset({"trl_default", "trl_best"})


class Target(ConfigSection):
    """A performance target of peftbench for a case."""

    case: str
    what: Literal["speed", "peak"]
    study: float
    """Relative to HF Trainer as the study ran it: minimum speed ratio, or maximum ratio of peaks."""
    best: float
    """The same relative to the best other arm, the fastest by real tokens per second."""


TARGETS = (
    Target(case="full", what="speed", study=2.5, best=1.4),
    Target(case="lora", what="speed", study=2.5, best=1.4),
    Target(case="prompt_tuning", what="speed", study=2.5, best=1.4),
    Target(case="last_layer", what="speed", study=3.0, best=1.8),
    Target(case="last_layer_epoch2", what="speed", study=20.0, best=12.0),
    Target(case="full", what="peak", study=0.45, best=0.7),
)

ROUNDING = 1e-5
"""Largest relative loss difference of two arms in fp32, from another summation order over all steps."""
LOW_PRECISION = 1e-3
"""The same if an arm multiplies in 16 bits."""


class Spec(ConfigSection):
    """Settings that all arms share."""

    device: Kind = "cpu"
    """Device to run on."""
    precision: Precision = "bf16"
    """Arithmetic of peftbench and of the peers' best arms; weights stay in float32."""
    batch: int = Field(default=4, gt=0)
    """Examples per optimizer step."""
    micro_batch: int = Field(default=1, gt=0)
    """Examples per forward pass of the peers' best arms, which accumulate; examples are grouped by length."""
    warmup: int = Field(default=2, gt=0)
    """First steps, excluded from time and memory; FLOPs are counted in the first."""
    steps: int = Field(default=6, gt=0)
    """Timed optimizer steps."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Initial learning rate, with linear decay to zero."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Zero, since HF Trainer excludes biases and norms and peftbench does not."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """The global gradient norm is clipped to this."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Every dropout of the base model. Above zero the arms draw different masks, so losses differ."""
    num_virtual_tokens: int = Field(default=20, gt=0)
    """Virtual tokens of prompt tuning; every method's sequences are shorter by this number."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the base model's weights, new weights and the order of examples."""
    threads: int = Field(default=1, gt=0)
    """torch threads on the CPU."""

    @model_validator(mode="after")
    def _parts_of_a_batch(self) -> Spec:
        if self.batch % self.micro_batch:
            raise ValueError(f"batch {self.batch} cannot be cut into micro-batches of {self.micro_batch}")
        return self

    def untimed_steps(self, case: str) -> int:
        """Return the steps before the clock starts: the first epoch if the second is timed."""
        return self.steps if CASES[case].later_epoch else self.warmup

    def total_steps(self, case: str) -> int:
        """Return the number of training steps."""
        return self.untimed_steps(case) + self.steps

    def examples(self, case: str) -> int:
        """Return the number of distinct examples, i.e. of one epoch."""
        return self.batch * (self.steps if CASES[case].later_epoch else self.total_steps(case))


DEFAULTS: dict[Kind, dict[str, Any]] = {
    "cpu": {},
    # The whole batch in one forward pass uses a GPU best. Every step has another shape; until torch's allocator has
    # blocks for them, a step takes twice as long.
    "cuda": {"batch": 16, "micro_batch": 16, "warmup": 8, "steps": 10},
}
REPEATS = 3


class Job(ConfigSection):
    """One arm's measurement."""

    spec: Spec
    case: str
    arm: str
    repeat: int
    """Counted from 1."""
    train: str
    """File with the examples."""
    base: str
    """Folder with the initial weights of all arms, and the tokenizer."""
    out: str
    """File for the record."""


def tolerance(arm: str, spec: Spec) -> float:
    """Return the largest relative loss difference from peftbench that is allowed for an arm."""
    own = {"hf_study": "fp16" if spec.device == "cuda" else "fp32", "trl_default": "bf16"}.get(arm, spec.precision)
    return ROUNDING if own == spec.precision == "fp32" else LOW_PRECISION


def method_settings(case: str, spec: Spec) -> dict[str, Any]:
    """Return the recipe's method section; the rest is peftbench's defaults."""
    method = CASES[case].method
    return {"kind": method} | ({"num_virtual_tokens": spec.num_virtual_tokens} if method == "prompt_tuning" else {})


def own_settings(case: str, spec: Spec) -> dict[str, Any]:
    """Return the keys of ``train`` that only peftbench's arm sets."""
    # The hidden states of a frozen backbone are computed in the first epoch and loaded in the timed one.
    return {"feature_cache": spec.precision} if CASES[case].later_epoch else {}


def peer_settings(arm: str, spec: Spec, *, flattens: bool) -> dict[str, Any]:
    """Return the arguments that differ between the arms of HF Trainer and TRL.

    ``flattens``: flash attention is available, so a batch can be one row without padding.
    """
    whole = {"per_device_train_batch_size": spec.batch, "gradient_accumulation_steps": 1}
    parts = {
        "per_device_train_batch_size": spec.micro_batch,
        "gradient_accumulation_steps": spec.batch // spec.micro_batch,
    }
    best = (whole if flattens else parts) | {
        "bf16": spec.precision == "bf16",
        "optim": "adamw_torch_fused",
        "gradient_checkpointing": False,
        "logging_nan_inf_filter": False,  # it would synchronize in every micro-batch
    }
    arms: dict[str, dict[str, Any]] = {
        "hf_study": whole | {"fp16": spec.device == "cuda", "optim": "adamw_torch"},
        "hf_best": best,
        "trl_default": whole,
        # No sequence is too long; TRL flattens only with max_length None.
        "trl_best": best | {"padding_free": flattens, "max_length": None},
    }
    return arms[arm]
