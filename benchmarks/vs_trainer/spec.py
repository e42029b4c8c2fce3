"""What is measured: every knob of this benchmark, in one place. Imports nothing that could start CUDA."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from peftbench.common.schema import ConfigSection

Precision = Literal["fp32", "bf16"]
Kind = Literal["cpu", "cuda"]


class Case(ConfigSection):
    """A method, and from when on it is timed."""

    method: str
    """As peftbench names it."""
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
    """What peftbench is to reach with a case."""

    case: str
    what: Literal["speed", "peak"]
    study: float
    """Beside HF Trainer as the study ran it: its speed times this, or its peak times this at most."""
    best: float
    """The same beside the best other arm, which is the fastest by real tokens per second."""


TARGETS = (
    Target(case="full", what="speed", study=2.5, best=1.4),
    Target(case="lora", what="speed", study=2.5, best=1.4),
    Target(case="prompt_tuning", what="speed", study=2.5, best=1.4),
    Target(case="last_layer", what="speed", study=3.0, best=1.8),
    Target(case="last_layer_epoch2", what="speed", study=20.0, best=12.0),
    Target(case="full", what="peak", study=0.45, best=0.7),
)

ROUNDING = 1e-5
"""Most that a loss may be off, relatively, between two arms in fp32: sums in another order, over all steps."""
LOW_PRECISION = 1e-3
"""The same where an arm multiplies in 16 bits."""


class Spec(ConfigSection):
    """Everything that all arms share."""

    device: Kind = "cpu"
    """Where it runs."""
    precision: Precision = "bf16"
    """Arithmetic of peftbench and of the peers' best arms; weights stay in float32."""
    batch: int = Field(default=4, gt=0)
    """Examples of one optimizer step."""
    micro_batch: int = Field(default=1, gt=0)
    """Examples in one forward pass of the peers' best arms, which accumulate; neighbours in length go together."""
    warmup: int = Field(default=2, gt=0)
    """First steps of the training that are in no figure; FLOPs are counted in the first."""
    steps: int = Field(default=6, gt=0)
    """Timed optimizer steps."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak of a linear decay to zero."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Zero, since HF Trainer spares biases and norms and peftbench does not."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """The global gradient norm is clipped to this."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Every dropout of the base. Above zero the arms draw other masks, and losses cannot be equal."""
    soft_tokens: int = Field(default=20, gt=0)
    """Of prompt tuning; sequences are that much shorter than the model's positions, with every method."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of the base's weights, of new weights and of the order of examples."""
    threads: int = Field(default=1, gt=0)
    """Of torch, on the CPU."""

    @model_validator(mode="after")
    def _parts_of_a_batch(self) -> Spec:
        if self.batch % self.micro_batch:
            raise ValueError(f"batch {self.batch} cannot be cut into micro-batches of {self.micro_batch}")
        return self

    def warmup_steps(self, case: str) -> int:
        """Steps before the clock starts: the whole first epoch, where the second is timed."""
        return self.steps if CASES[case].later_epoch else self.warmup

    def total_steps(self, case: str) -> int:
        """Steps of the training."""
        return self.warmup_steps(case) + self.steps

    def examples(self, case: str) -> int:
        """How many different examples there are: as many as one epoch shall have."""
        return self.batch * (self.steps if CASES[case].later_epoch else self.total_steps(case))


DEFAULTS: dict[Kind, dict[str, Any]] = {
    "cpu": {},
    # A GPU is best used by the whole batch at once. Every step has another shape, and until torch's allocator has
    # blocks for them a step takes twice its time.
    "cuda": {"batch": 16, "micro_batch_size": 16, "warmup": 8, "steps": 10},
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
    """Folder with the weights that all arms start from, and the tokenizer."""
    out: str
    """File for the record."""


def tolerance(arm: str, spec: Spec) -> float:
    """How far an arm's losses may be from peftbench's, relatively."""
    own = {"hf_study": "fp16" if spec.device == "cuda" else "fp32", "trl_default": "bf16"}.get(arm, spec.precision)
    return ROUNDING if own == spec.precision == "fp32" else LOW_PRECISION


def method_knobs(case: str, spec: Spec) -> dict[str, Any]:
    """The method as a recipe has it; all else is peftbench's default."""
    method = CASES[case].method
    return {"kind": method} | ({"num_virtual_tokens": spec.soft_tokens} if method == "prompt_tuning" else {})


def own_knobs(case: str, spec: Spec) -> dict[str, Any]:
    """What peftbench's arm sets in the recipe's ``train`` beyond what all arms share; all else is its defaults."""
    # A frozen trunk's hidden states are computed in the first epoch alone, and read in those that are timed.
    return {"feature_cache": spec.precision} if CASES[case].later_epoch else {}


def peer_settings(arm: str, spec: Spec, *, flattens: bool) -> dict[str, Any]:
    """The arguments in which the arms of HF Trainer and TRL differ; the shared ones are in ``peers.py``.

    ``flattens``: flash attention is there, so that a batch can be one long row without padding.
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
        "logging_nan_inf_filter": False,  # which would wait for the device in every micro-batch
    }
    arms: dict[str, dict[str, Any]] = {
        "hf_study": whole | {"fp16": spec.device == "cuda", "optim": "adamw_torch"},
        "hf_best": best,
        "trl_default": whole,
        # Sequences fit, so nothing is cut; TRL takes them flattened only where it is told not to cut.
        "trl_best": best | {"padding_free": flattens, "max_length": None},
    }
    return arms[arm]
