"""Recipe schema: every key that can change a result, typed and frozen. Read from and written to YAML.

Every key is defined here, in a method's file (``methods/``), a source's file (``data/sources.py``) or an optimizer's
class (``optim/``). Its docstring gives meaning and unit; ``peftbench show`` prints it. Accelerate and DeepSpeed config
files set where a run executes, never what it computes.
"""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from peftbench.common.fingerprint import fingerprint_measured_training, fingerprint_recipe, fingerprint_training
from peftbench.common.schema import ConfigSection, PathText
from peftbench.common.units import parse_size
from peftbench.data.sources import AnySource
from peftbench.data.text_set import AnyText, TextSet
from peftbench.errors import BudgetError
from peftbench.methods import AnyMethod
from peftbench.optim import AdamW, AnyOptimizer
from peftbench.tasks import AnyTask
from peftbench.tasks.auto import Auto

Precision = Literal["fp32", "bf16", "fp16"]
"""Types of numbers by the names that recipes use."""
Split = Literal["validation", "test"]


MAX_NAME_LENGTH = 255
"""Characters in the name of a run, which is the name of its folder."""


def why_warmup_is_too_long(warmup_steps: int, steps: int) -> str | None:
    """Return why no step is left after the warm-up, None if one is."""
    if warmup_steps < steps:
        return None
    return f"schedule.warmup_steps={warmup_steps} must be less than the number of training steps ({steps}); lower it"


class Model(ConfigSection):
    """Base model that every method starts from."""

    path: PathText = "shipped"
    """Local folder, folder of a finished run, GGUF file, name on the Hub, or "shipped" for the bundled model."""
    tokenizer: PathText | None = None
    """Local folder or Hub name of the tokenizer; null: the model's own."""
    revision: str | None = None
    """Branch, tag or commit on the Hub. The record has the commit that was loaded."""
    init: Literal["pretrained", "random"] = "pretrained"
    """pretrained: load the weights; random: initialize the architecture with random weights (noted in the record)."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Probability of every dropout layer in the base model; null: as in the model's config."""
    attention: Literal["auto", "flash_attention_2", "sdpa", "eager"] = "auto"
    """Attention implementation, by its name in transformers; auto: the first that architecture and device support."""
    fused_gelu: bool = True
    """Compute GPT-2's tanh GELU in one kernel: fewer activations, 2.4e-7 off; false: bit-equal to transformers."""
    quantization: Literal["nf4", "nf4_double", "int8"] | None = None
    """4 or 8 bits (bitsandbytes), for methods that keep matrices frozen; set by weights that are stored quantized."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Type in which frozen weights are held; trained ones stay float32. auto: the type of train.precision."""
    trust_remote_code: bool = False
    """Run Python code from the model's repository. Use it only for a source you trust."""


class Data(ConfigSection):
    """Examples, and how they are tokenized and padded."""

    source: AnySource
    """Source of the examples: arithmetic, docstring_libraries, docstrings, files, hub or synthetic."""
    train: int | None = Field(default=None, gt=0)
    """Number of examples sampled from the training split, with data.seed; null: all."""
    validation: int | None = Field(default=None, gt=0)
    """Number of examples sampled from the validation split; null: all."""
    test: int | None = Field(default=None, gt=0)
    """Number of examples sampled from the test split; null: all."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed for sampling the examples."""
    max_length: int | None = Field(default=None, gt=0)
    """Longest sequence in tokens, without virtual tokens; null: the model's positions minus the virtual tokens."""
    overlong: Literal["refuse", "drop"] = "refuse"
    """An example that is too long, even when its context is cut: refuse it, or drop it and count it in the record."""
    padding: Literal["auto", "free", "longest", "max_length"] = "auto"
    """free: no padding, sequences share a row but not attention; longest, max_length: pad; auto: free if supported."""
    pad_to_multiple_of: int = Field(default=1, gt=0)
    """Pad rows to a multiple of this. On CPU in 16 bits, each new shape costs memory and time: use 64."""
    label_padding: bool = False
    """Label every token, padding included, and do not group batches by length, as in the published study."""

    @model_validator(mode="after")
    def _check_padding(self) -> Data:
        if self.padding == "max_length" and self.max_length is None:
            raise ValueError("padding=max_length needs data.max_length")
        if self.label_padding and self.padding == "free":
            raise ValueError("label_padding=true needs padding, and padding=free has none; use longest or max_length")
        if self.label_padding and self.pad_to_multiple_of > 1:
            raise ValueError("with label_padding=true, pad_to_multiple_of changes the loss; leave it at 1")
        if self.padding == "max_length" and self.pad_to_multiple_of > 1:
            raise ValueError("padding=max_length gives all rows the same width; leave pad_to_multiple_of at 1")
        return self


class Schedule(ConfigSection):
    """Learning rate schedule."""

    kind: Literal["linear", "cosine", "constant"] = "linear"
    """Decay after warm-up: linear to zero, half cosine to zero, or none."""
    warmup_steps: int = Field(default=0, ge=0)
    """Number of steps in which the learning rate rises linearly from zero."""


class Train(ConfigSection):
    """Training length, batch sizes, precision and memory techniques."""

    steps: int | None = Field(default=None, gt=0)
    """Number of optimizer steps. Set this or epochs."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the training examples; steps = epochs x examples / global_batch_size, rounded up."""
    global_batch_size: int = Field(default=16, gt=0)
    """Examples per optimizer step, over all processes and micro-batches."""
    repeat_examples: bool = False
    """Allow a global batch with more examples than the training split, which then repeat within a step."""
    micro_batch_size: PositiveInt | Literal["auto"] | None = None
    """Micro-batch size per process. null: the process's whole share; auto: the largest size predicted to fit."""
    micro_batch_tokens: int | None = Field(default=None, gt=0)
    """Most tokens per forward pass, padding and virtual tokens included; replaces micro_batch_size."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast precision; trained weights stay float32, except with a bf16 optimizer. auto: what the device has."""
    logits: Literal["labels_only", "all"] = "labels_only"
    """Positions that the output head computes in training: those with a label, or all. The loss is the same."""
    cross_entropy: Literal["torch", "liger"] = "torch"
    """Cross-entropy implementation: torch in chunks, or Liger Kernel (CUDA; must be installed)."""
    compile: bool = False
    """Compile each block with torch.compile. The first steps take minutes: raise profile.untimed_steps."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    activation_offloading: bool = False
    """Offload activations to CPU memory until the backward pass: much less GPU memory, limited by the bus's speed."""
    feature_cache: Literal["fp32", "bf16"] | None = None
    """Cache the hidden states of the frozen part on disk in this dtype; later epochs read them. null: no cache."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Largest global gradient norm; larger gradients are clipped. null: no clipping."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of new weights, batch order and dropout. Batch order is the same for every method."""

    @field_validator("micro_batch_size", mode="before")
    @classmethod
    def _check_micro_batch_type(cls, value: object) -> object:
        if isinstance(value, str) and value != "auto":
            raise ValueError("must be a number of examples, auto or null")
        return value

    @model_validator(mode="after")
    def _check_exclusive_settings(self) -> Train:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("set exactly one of train.steps and train.epochs")
        if self.micro_batch_tokens is not None and self.micro_batch_size is not None:
            raise ValueError("set micro_batch_size or micro_batch_tokens, not both")
        return self

    @property
    def resolved_micro_batch_size(self) -> int | None:
        """``micro_batch_size`` as a number; ``auto`` must be resolved before."""
        assert self.micro_batch_size != "auto", "a run resolves auto before anything is built"
        return self.micro_batch_size

    @property
    def resolved_precision(self) -> Precision:
        """``precision`` without ``auto``, which must be resolved before."""
        assert self.precision != "auto", "a run resolves auto before anything is built"
        return self.precision


class Evaluate(ConfigSection):
    """Evaluation after training, not part of training time."""

    split: Split = "test"
    """Held-out split to evaluate on."""
    batch_size: int = Field(default=16, gt=0)
    """Batch size of evaluation and generation, per process."""
    metrics: tuple[str, ...] | None = None
    """Metrics by name, or module:function of your own (docs/guides/metrics.md); null: the task's; []: no generation."""
    headline_metric: str | None = None
    """Score by which runs are compared, e.g. exact_match; null: the task's own, or the first score of the metrics."""
    max_new_tokens: int = Field(default=64, gt=0)
    """Maximum number of tokens of a generated text."""
    num_beams: int = Field(default=1, gt=0)
    """Number of beams; 1 is greedy decoding."""
    teacher_forced: bool = False
    """Also compute the metrics on the teacher-forced argmax, as the published study did; reported separately."""
    bootstrap_resamples: int = Field(default=1000, ge=100)
    """Number of bootstrap resamples for each 95 % interval."""
    saved_samples: int = Field(default=5, ge=0)
    """Number of generated texts saved in the record, with prompt and reference."""
    interval: PositiveInt | str | None = None
    """Evaluate the validation split during training every N steps, or e.g. 0.5ep (epochs); null: never."""
    interval_metrics: bool = False
    """Also generate at each evaluation of evaluate.interval and record the means of the metrics; slow."""
    general_text: AnyText | None = None
    """Text whose loss shows forgetting: "shipped", a .txt file, or {path: NAME} of a data set; null: none."""

    @field_validator("interval", mode="before")
    @classmethod
    def _check_interval(cls, value: object) -> object:
        is_steps = isinstance(value, int) and not isinstance(value, bool) and value > 0
        is_epochs = (
            isinstance(value, str)
            and re.fullmatch(r"\d{1,9}(\.\d{1,9})?ep", value, re.ASCII) is not None
            and Fraction(value.removesuffix("ep")) > 0
        )
        if not (value is None or is_steps or is_epochs):
            raise ValueError("must be a number of steps, e.g. 50, a part of an epoch, e.g. 0.5ep, or null")
        return value

    @field_validator("general_text")
    @classmethod
    def _check_general_text(cls, value: str | TextSet | None) -> str | TextSet | None:
        if isinstance(value, str) and value != "shipped" and not value.endswith(".txt"):
            raise ValueError('must be "shipped", the path of a .txt file, a data set ({path: ...}), or null')
        return value

    @model_validator(mode="after")
    def _check_interval_metrics(self) -> Evaluate:
        if self.interval_metrics and (self.interval is None or self.metrics == ()):
            raise ValueError("interval_metrics=true needs evaluate.interval and metrics; set both, or omit it")
        return self

    def count_interval_steps(self, num_examples: int, global_batch_size: int) -> int | None:
        """Return ``interval`` in optimizer steps, at least 1; None if nothing is evaluated during training."""
        if not isinstance(self.interval, str):
            return self.interval
        return max(1, round(Fraction(self.interval.removesuffix("ep")) * num_examples / global_batch_size))


class Profile(ConfigSection):
    """Measurement of time, memory and cost."""

    untimed_steps: int = Field(default=5, ge=0)
    """Number of first training steps excluded from time, throughput and memory."""
    memory_breakdown: bool = False
    """Record peak memory by category (weights, gradients, activations ...), measured in the last untimed step."""
    price_per_hour: float | None = Field(default=None, gt=0)
    """Price of one device per hour, in any currency; null: no price is shown."""

    @model_validator(mode="after")
    def _check_breakdown_steps(self) -> Profile:
        if self.memory_breakdown and self.untimed_steps < 2:
            raise ValueError(
                "memory_breakdown=true needs untimed_steps of at least 2: it is measured in the last untimed step, "
                "after optimizer states are allocated"
            )
        return self


class Budget(ConfigSection):
    """Memory limit to enforce on a larger device."""

    memory: str | None = None
    """Memory limit per process, e.g. 16GiB; on GPU with the CUDA context, on CPU without libraries. null: no limit."""

    @field_validator("memory", mode="before")
    @classmethod
    def _check_memory_size(cls, value: object) -> object:
        if not isinstance(value, (int, str)) or isinstance(value, bool):
            return value  # pydantic reports the wrong type
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
    """Checkpoints of the full training state. A stopped run resumes from the latest one when it is launched again."""

    interval: int | None = Field(default=None, gt=0)
    """Save the full training state every N steps; null: never."""
    keep_latest: int = Field(default=2, gt=0)
    """Number of latest checkpoints to keep. All are deleted when the run succeeds."""
    keep_best: bool = False
    """Save and evaluate the weights with the lowest held-out loss (see evaluate.interval) instead of the last ones."""


class EarlyStopping(ConfigSection):
    """End the training before its last step when the held-out loss of evaluate.interval no longer falls."""

    patience: int | None = Field(default=None, gt=0)
    """End the training after this many evaluations in a row without improvement; null: never."""
    min_delta: float = Field(default=0.0, ge=0)
    """A loss counts as an improvement if it is more than this many nats below the lowest loss so far."""
    allow_unequal_steps: bool = False
    """Allow patience in a suite of several runs, which may then train for different numbers of steps."""

    @model_validator(mode="after")
    def _check_min_delta(self) -> EarlyStopping:
        if self.min_delta and self.patience is None:
            raise ValueError("min_delta needs early_stopping.patience; set both or neither")
        return self


class Recipe(ConfigSection):
    """One run. The same recipe gives the same results on any engine and process count, up to rounding."""

    name: str
    """Name of the run and of its folder: letters, digits and . _ = + -"""
    output_dir: PathText = "runs"
    """Folder for runs. The record is written to <output_dir>/<name>/record.json."""
    model: Model = Model()
    """Base model that every method starts from."""
    method: AnyMethod
    """Fine-tuning method."""
    data: Data
    """Examples, and how they are tokenized and padded."""
    task: AnyTask = Auto()
    """Task: format of an example, its labels, the generated text and its metrics."""
    optimizer: AnyOptimizer = AdamW()
    """Optimizer of the trained parameters."""
    schedule: Schedule = Schedule()
    """Learning rate schedule."""
    train: Train
    """Training length, batch sizes, precision and memory techniques."""
    evaluate: Evaluate = Evaluate()
    """Evaluation after training, not part of training time."""
    profile: Profile = Profile()
    """Measurement of time, memory and cost."""
    budget: Budget = Budget()
    """Memory limit to enforce on a larger device."""
    checkpoint: Checkpoint = Checkpoint()
    """Checkpoints from which a stopped run resumes."""
    early_stopping: EarlyStopping = EarlyStopping()
    """End of the training when the held-out loss no longer falls."""
    save_model: bool = True
    """Save the trained weights in <output_dir>/<name>/model, in the format of transformers or peft."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "swanlab"], ...] = ()
    """Experiment trackers, through accelerate."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._=+-]*", value):
            raise ValueError("must start with a letter or digit and contain only letters, digits and . _ = + -")
        if len(value) > MAX_NAME_LENGTH:
            raise ValueError(
                f"has {len(value)} characters, and the name of a folder may have {MAX_NAME_LENGTH}; shorten it"
            )
        return value

    @model_validator(mode="after")
    def _check_base_is_another_folder(self) -> Recipe:
        if Path(self.model.path).absolute() == (Path(self.output_dir) / self.name).absolute():
            raise ValueError(
                f"model.path={self.model.path} is the folder that this run writes to; give the run another name"
            )
        return self

    @model_validator(mode="after")
    def _check_steps(self) -> Recipe:
        steps = self.train.steps if self.method.is_trainable else None
        if steps is not None and (reason := why_warmup_is_too_long(self.schedule.warmup_steps, steps)):
            raise ValueError(reason)
        if steps is not None and (reason := self.method.why_steps_are_too_few(steps)):
            raise ValueError(reason)
        return self

    @model_validator(mode="after")
    def _check_schedule(self) -> Recipe:
        if self.optimizer.averages_weights and self.method.is_trainable and self.schedule.kind != "constant":
            raise ValueError(
                f"optimizer.kind={self.optimizer.kind} averages the weights in place of a decay, and schedule.kind="
                f"{self.schedule.kind} decays the learning rate; set schedule.kind=constant"
            )
        return self

    @model_validator(mode="after")
    def _check_feature_cache(self) -> Recipe:
        if self.train.feature_cache is None:
            return self
        if not self.method.supports_feature_cache:
            raise ValueError(
                f"train.feature_cache={self.train.feature_cache} needs a method that trains only upper layers of the "
                f"base model, and this {self.method.kind} does not; use last_blocks, select, or last_layer with "
                "method.head=untied, or set train.feature_cache=null"
            )
        conflict = "data.label_padding=true" if self.data.label_padding else None
        if self.train.logits == "all" and self.method.has_frozen_backbone:
            conflict = conflict or "train.logits=all"
        if conflict is not None:
            positions = "labeled positions" if self.method.has_frozen_backbone else "real tokens"
            raise ValueError(
                f"train.feature_cache stores hidden states of {positions} only, and {conflict} needs more; "
                "set one of the two to its default"
            )
        return self

    @model_validator(mode="after")
    def _check_micro_batch_tokens(self) -> Recipe:
        if self.data.label_padding and self.train.micro_batch_tokens is not None:
            raise ValueError(
                "data.label_padding=true keeps examples in sampling order, and train.micro_batch_tokens sorts them by "
                "length; use train.micro_batch_size instead"
            )
        return self

    @model_validator(mode="after")
    def _check_selection_interval(self) -> Recipe:
        if self.selects_by_held_out_loss and self.evaluate.interval is None:
            key = "checkpoint.keep_best=true" if self.checkpoint.keep_best else "early_stopping.patience"
            raise ValueError(
                f"{key} needs the held-out loss during training; set evaluate.interval, e.g. evaluate.interval=50"
            )
        return self

    @property
    def selects_by_held_out_loss(self) -> bool:
        """True if the held-out loss during training decides which weights are saved, or after how many steps."""
        return self.checkpoint.keep_best or self.early_stopping.patience is not None

    @property
    def has_auto_settings(self) -> bool:
        """True if a key is ``auto`` whose meaning depends on the device and changes numbers."""
        return self.train.precision == "auto" or (self.model.attention == "auto" and self.method.needs_model)

    @property
    def needs_resolution(self) -> bool:
        """True if a key that changes numbers may depend on the device (``auto``) or on the model's folder."""
        return (
            "auto" in {self.train.precision, self.model.dtype} or not self.task.is_resolved or self.method.needs_model
        )

    @property
    def frozen_dtype(self) -> Precision:
        """The type in which frozen weights are held; ``train.precision`` must be resolved.

        It is fp32 for a method that freezes no weights, which ignores ``model.dtype``.
        """
        if not self.method.freezes_weights:
            return "fp32"
        return self.train.resolved_precision if self.model.dtype == "auto" else self.model.dtype

    def with_resolved_dtype(self) -> Recipe:
        """Return the recipe with ``model.dtype`` resolved; ``train.precision`` must be resolved."""
        return self.model_copy(update={"model": self.model.model_copy(update={"dtype": self.frozen_dtype})})

    def fingerprint(self) -> str:
        """Return the hash of every key that can change a number. Resolve ``auto`` and a stored quantization before."""
        return fingerprint_recipe(self.model_dump(mode="json"))

    def fingerprint_training(self) -> str:
        """Return the hash of every key that can change a trained weight. A checkpoint belongs to it."""
        return fingerprint_training(self.model_dump(mode="json"))

    def fingerprint_measured_training(self) -> str:
        """Return the hash of every key that can change a trained weight or a measurement of the training."""
        return fingerprint_measured_training(self.model_dump(mode="json"))
