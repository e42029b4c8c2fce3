"""Recipe: everything that may change a number, typed and frozen. YAML goes in and comes out.

Any knob of the project is found here, in a method's file (``methods/``), a source's file (``data/sources.py``) or an
optimizer's class (``optim/``), with its unit and its meaning. Accelerate and DeepSpeed files say where a run happens,
never what is computed.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from peftbench.common.fingerprint import fingerprint_recipe
from peftbench.common.schema import ConfigSection
from peftbench.common.units import parse_size
from peftbench.data.sources import AnySource
from peftbench.errors import BudgetError
from peftbench.methods import AnyMethod
from peftbench.optim import AdamW, AnyOptimizer

Precision = Literal["fp32", "bf16", "fp16"]
Split = Literal["validation", "test"]


class Model(ConfigSection):
    """The base every method starts from."""

    path: str = "shipped"
    """A folder, a model's name on the hub, or "shipped" for the small base that comes with peftbench."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer, where it does not lie with the model."""
    revision: str | None = None
    """Branch, tag or commit on the hub; the commit that was loaded is recorded."""
    init: Literal["pretrained", "random"] = "pretrained"
    """Whether to load weights, or to build the architecture alone with random ones (said so in the record)."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Probability of every dropout in the base; null keeps what its config says."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation, as transformers names them; one that is not there is refused."""
    fused_gelu: bool = True
    """GPT-2's tanh GELU in one kernel: fewer activations, 2.4e-7 off; false is Hugging Face's to the last bit."""
    quantization: Literal["nf4", "nf4_double", "int8"] | None = None
    """Hold the base in 4 or 8 bits (bitsandbytes) for methods that leave it as it is: lora (QLoRA), prompt_tuning."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Only for a source you trust."""


class Data(ConfigSection):
    """Which examples, and how they become tokens."""

    source: AnySource
    """Where the examples come from: docstrings, files or hub."""
    train: int | None = Field(default=None, gt=0)
    """Examples drawn (seeded) from the training split; null takes all."""
    validation: int | None = Field(default=None, gt=0)
    """Examples drawn from the validation split; null takes all."""
    test: int | None = Field(default=None, gt=0)
    """Examples drawn from the test split; null takes all."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the subsample: which examples are drawn."""
    max_length: int | None = Field(default=None, gt=0)
    """Longest sequence in real tokens, virtual ones not counted; null takes what the model's positions leave."""
    separator: str = "\nTL;DR:"
    """Between article and summary. Must not end in a space, which belongs to the next word's token."""
    overlong: Literal["refuse", "drop"] = "refuse"
    """What to do with an example whose summary leaves no room for any article; drops are counted in the record."""
    padding: Literal["auto", "free", "longest", "max_length"] = "auto"
    """none: examples share a row and see no other; longest, max_tokens: pad to those; auto: none where it can be."""
    pad_to_multiple_of: int = Field(default=1, gt=0)
    """Pad rows to multiples of so many positions; on CPU in 16 bits every new size costs memory and time, 64 helps."""
    label_padding: bool = False
    """Label every token, padding too, in batches not grouped by length, as the published study did."""

    @field_validator("separator")
    @classmethod
    def _check_separator(cls, value: str) -> str:
        if not value or value != value.rstrip(" "):
            raise ValueError("must be a text that does not end in a space")
        return value

    @model_validator(mode="after")
    def _check_padding(self) -> Data:
        if self.padding == "max_length" and self.max_length is None:
            raise ValueError("padding to max_tokens needs data.max_length")
        if self.label_padding and self.padding == "free":
            raise ValueError("as_published labels padding, and padding: free has none; use longest or max_tokens")
        if self.label_padding and self.pad_to_multiple_of > 1:
            raise ValueError("as_published labels padding, so pad_to_multiple_of would change the loss; leave it at 1")
        if self.padding == "max_length" and self.pad_to_multiple_of > 1:
            raise ValueError("padding to max_tokens makes all rows one width; leave pad_to_multiple_of at 1")
        return self


class Schedule(ConfigSection):
    """The learning rate over the steps."""

    kind: Literal["linear", "cosine", "constant"] = "linear"
    """Decay after warm-up: linearly to zero, along a half cosine to zero, or none."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the rate rises linearly from zero."""


class Train(ConfigSection):
    """How long, how much at once and how exactly."""

    steps: int | None = Field(default=None, gt=0)
    """Optimizer steps; give this or epochs."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the training examples; steps are this times examples over global_batch, rounded up."""
    global_batch_size: int = Field(default=16, gt=0)
    """Examples in one optimizer step, over all processes and micro-batches."""
    micro_batch_size: PositiveInt | Literal["auto"] | None = None
    """Most examples in one forward pass of one process; null: all; auto: the most predicted to fit budget or GPU."""
    micro_batch_tokens: int | None = Field(default=None, gt=0)
    """Most tokens in one forward pass (padding, virtual), instead of micro_batch; as few passes as keep to it."""
    precision: Precision = "fp32"
    """Arithmetic of forward and backward pass; trained weights stay in float32, unless the optimizer says bf16."""
    logits: Literal["labels_only", "all"] = "labels_only"
    """Positions that the output head computes in training: those that predict a labelled token, or all; same loss."""
    cross_entropy: Literal["torch", "liger"] = "torch"
    """What computes the loss from hidden states: torch, in chunks; or Liger Kernel, on CUDA, if it is installed."""
    compile: bool = False
    """Compile each block with torch.compile; the first steps take minutes: give profile.untimed_steps enough of them."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    activation_offloading: bool = False
    """Keep activations in the CPU's memory until the backward pass: much less GPU memory, as slow as the bus is."""
    feature_cache: Literal["fp32", "bf16"] | None = None
    """Keep a frozen trunk's hidden states on disk in this type, and compute them in the first epoch alone."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Clip the global gradient norm to this; null does not clip."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of new weights, of the order of batches and of dropout; the same order for every method."""

    @field_validator("micro_batch_size", mode="before")
    @classmethod
    def _check_micro_batch_type(cls, value: object) -> object:
        if isinstance(value, str) and value != "auto":
            raise ValueError("must be a number of examples, auto or null")
        return value

    @model_validator(mode="after")
    def _check_exclusive_settings(self) -> Train:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("needs exactly one of train.steps and train.epochs")
        if self.micro_batch_tokens is not None and self.micro_batch_size is not None:
            raise ValueError("takes micro_batch or micro_tokens, and not both")
        return self

    @property
    def resolved_micro_batch_size(self) -> int | None:
        """``micro_batch`` as a number, once ``auto`` has become one."""
        assert self.micro_batch_size != "auto", "a run settles it before anything is built"
        return self.micro_batch_size


class Evaluate(ConfigSection):
    """What is measured after training, outside its clock."""

    split: Split = "test"
    """Which held-out split."""
    batch_size: int = Field(default=16, gt=0)
    """Examples at once in evaluation and generation, per process."""
    generate: bool = True
    """Write summaries (greedy, or by beams) and score them with ROUGE."""
    max_new_tokens: int = Field(default=64, gt=0)
    """Longest generated summary, in tokens."""
    num_beams: int = Field(default=1, gt=0)
    """Beams of the search; 1 is greedy."""
    teacher_forced: bool = False
    """Also give the study's ROUGE on teacher-forced argmax, under that name."""
    bootstrap_resamples: int = Field(default=1000, ge=100)
    """Bootstrap resamples behind each 95 % interval."""
    saved_samples: int = Field(default=5, ge=0)
    """Generated summaries kept in the record, with article and reference."""


class Profile(ConfigSection):
    """How the run is measured."""

    untimed_steps: int = Field(default=5, ge=0)
    """First steps of the training that are in no figure of time, throughput or memory."""
    memory_breakdown: bool = False
    """Record who holds the memory at its peak (weights, gradients, activations ...), in the last warm-up step."""
    price_per_hour: float | None = Field(default=None, gt=0)
    """What one device costs an hour, in any currency; null shows no price."""

    @model_validator(mode="after")
    def _check_breakdown_steps(self) -> Profile:
        if self.memory_breakdown and self.untimed_steps < 2:
            raise ValueError(
                "a breakdown needs warmup_steps of 2 or more: it is made in the last, when optimizer states are there"
            )
        return self


class Budget(ConfigSection):
    """What a run must do with, where there is more."""

    memory: str | None = None
    """Hold each process to this much memory, as 16GiB, with all that it has on the GPU; on CPU beyond its libraries."""

    @field_validator("memory", mode="before")
    @classmethod
    def _check_memory_size(cls, value: object) -> object:
        if not isinstance(value, (int, str)) or isinstance(value, bool):
            return value  # which is refused for its type
        try:
            parse_size(str(value))
        except BudgetError as error:
            raise ValueError(str(error)) from error
        return str(value)

    @property
    def memory_bytes(self) -> int | None:
        """``memory`` in bytes."""
        return None if self.memory is None else parse_size(self.memory)


class Checkpoint(ConfigSection):
    """What is kept while training, so that a run that was stopped goes on where it was; launch it again to do so."""

    interval: int | None = Field(default=None, gt=0)
    """Write the whole state of the training every so many steps; null never does."""
    keep_latest: int = Field(default=2, gt=0)
    """How many of the newest are kept; all are taken away when the run has ended well."""


class Recipe(ConfigSection):
    """One run. The same recipe gives the same numbers on any engine and process count, up to rounding."""

    name: str
    """Name of the run and of its folder: letters, digits and . _ = + -"""
    output_dir: str = "runs"
    """Folder for runs; the record is written to <output_dir>/<name>/record.json."""
    model: Model = Model()
    """The base every method starts from."""
    method: AnyMethod
    """What is trained."""
    data: Data
    """Which examples, and how they become tokens."""
    optimizer: AnyOptimizer = AdamW()
    """What turns gradients into steps."""
    schedule: Schedule = Schedule()
    """The learning rate over the steps."""
    train: Train
    """How long, how much at once and how exactly."""
    evaluate: Evaluate = Evaluate()
    """What is measured after training, outside its clock."""
    profile: Profile = Profile()
    """How the run is measured."""
    budget: Budget = Budget()
    """What a run must do with, where there is more."""
    checkpoint: Checkpoint = Checkpoint()
    """What is kept while training, so that a run that was stopped goes on."""
    save_model: bool = True
    """Keep what was trained, in its ecosystem's format, in <output_dir>/<name>/model."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "swanlab"], ...] = ()
    """Live trackers, through accelerate; none by default."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._=+-]*", value):
            raise ValueError("must start with a letter or digit and hold only letters, digits and . _ = + -")
        return value

    @model_validator(mode="after")
    def _check_feature_cache(self) -> Recipe:
        if self.train.feature_cache is None:
            return self
        if not self.method.has_frozen_backbone:
            raise ValueError(
                f"train.feature_cache={self.train.feature_cache} keeps what a frozen trunk gives, and this "
                f"{self.method.kind} has none; use last_layer with method.head=untied, or set train.feature_cache=null"
            )
        if self.data.label_padding or self.train.logits == "all":
            other = (
                "data.label_padding=true labels padding" if self.data.label_padding else "train.logits=all wants more"
            )
            raise ValueError(
                f"train.feature_cache keeps hidden states of each example's labelled positions, and {other}; set one of "
                "the two to its default"
            )
        return self

    @model_validator(mode="after")
    def _check_micro_batch_tokens(self) -> Recipe:
        if self.data.label_padding and self.train.micro_batch_tokens is not None:
            raise ValueError(
                "data.label_padding takes examples as they are drawn; give train.micro_batch_size, not micro_tokens"
            )
        return self

    def fingerprint(self) -> str:
        """Return the hash of every key that can change a number."""
        return fingerprint_recipe(self.model_dump(mode="json"))
