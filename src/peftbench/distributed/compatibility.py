"""Which method, optimizer and precision runs on which engine, and with what more: one table, from which the tests and
the docs are made.

Whatever no rule refuses is run by the tests (tests/distributed/), two processes where the engine spreads over several.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from peftbench.distributed.engines import ENGINES
from peftbench.errors import CombinationError
from peftbench.methods import METHODS
from peftbench.optim import OPTIMIZERS

ADAPTER_METHODS = frozenset({"lora", "prompt_tuning"})
"""Methods that add to the base and change nothing of it."""
PRECISIONS = ("fp32", "bf16", "fp16")
QUANTIZATION, CHECKPOINTING, ACTIVATION_OFFLOAD = "quantization", "checkpoints", "activation_offload"
MICRO_BATCH_TOKENS, COMPILE, LIGER = "micro_batch_tokens", "compile", "liger"
FEATURE_CACHE = "trunk_cache"
OPTIONAL_FEATURES = {
    QUANTIZATION: ("model.quantization", "null"),
    CHECKPOINTING: ("checkpoint.interval", "null"),
    ACTIVATION_OFFLOAD: ("train.activation_offloading", "false"),
    MICRO_BATCH_TOKENS: ("train.micro_batch_tokens", "null"),
    COMPILE: ("train.compile", "false"),
    LIGER: ("train.cross_entropy", "torch"),
    FEATURE_CACHE: ("train.feature_cache", "null"),
}
"""What a recipe may ask for beside the four: its knob, and the value that leaves it out."""
_DEEPSPEED_ENGINES = frozenset(name for name, kind in ENGINES.items() if kind.is_deepspeed)
_OFFLOAD_ENGINES = frozenset(name for name, kind in ENGINES.items() if kind.offload_optimizer != "none")
_SHARDED_ENGINES = frozenset(name for name, kind in ENGINES.items() if kind.shards_weights)
_NVME_ENGINES = frozenset(name for name, kind in ENGINES.items() if kind.offloads_to_nvme)
_8BIT_OPTIMIZERS = frozenset({"adamw8bit", "paged_adamw8bit", "lion8bit"})
_MATRIX_OPTIMIZERS = frozenset(name for name, kind in OPTIMIZERS.items() if kind.needs_matrices)
_STOCHASTIC_ROUNDING_OPTIMIZERS = frozenset(name for name, kind in OPTIMIZERS.items() if kind.weight_dtype == "bf16")
_BITSANDBYTES_OPTIMIZERS = _8BIT_OPTIMIZERS | {"adamw32bit", "lion"}


@dataclass(frozen=True)
class Combination:
    """One point of the table."""

    method: str
    engine: str
    optimizer: str
    precision: str
    optional_features: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """Of method, optimizer and precision, fit for a folder."""
        return f"{self.method}-{self.optimizer}-{self.precision}"


@dataclass(frozen=True)
class Rule:
    """What is refused. A set that is None holds everything."""

    reason: str
    engines: frozenset[str] | None = None
    optimizers: frozenset[str] | None = None
    precisions: frozenset[str] | None = None
    methods: frozenset[str] | None = None
    devices: frozenset[str] | None = None
    optional_feature: str | None = None
    """Only where the recipe asks for this."""

    def matches(self, combination: Combination, device: str) -> bool:
        """Whether it speaks of this combination on this kind of device."""
        return (self.optional_feature is None or self.optional_feature in combination.optional_features) and all(
            allowed is None or value in allowed
            for value, allowed in (
                (combination.engine, self.engines),
                (combination.optimizer, self.optimizers),
                (combination.precision, self.precisions),
                (combination.method, self.methods),
                (device, self.devices),
            )
        )


RULES = (
    Rule(
        "the optimizer is shown one flat vector of each process's part, and this one needs the matrices",
        engines=_DEEPSPEED_ENGINES,
        optimizers=_MATRIX_OPTIMIZERS,
    ),
    Rule(
        "each process holds some rows of a matrix, of which a projection is another",
        engines=frozenset({"fsdp2"}),
        optimizers=_MATRIX_OPTIMIZERS - {"adafactor"},
    ),
    Rule(
        "torch's Adafactor has operations that its sharded tensors do not take",
        engines=frozenset({"fsdp2"}),
        optimizers=frozenset({"adafactor"}),
    ),
    Rule(
        "weights in bf16 are rounded by chance, by each process otherwise, and their copies would drift apart",
        engines=frozenset({"ddp"}),
        optimizers=_STOCHASTIC_ROUNDING_OPTIMIZERS,
    ),
    Rule(
        "ZeRO steps copies of the weights in float32, and there would be nothing to round",
        engines=_DEEPSPEED_ENGINES,
        optimizers=_STOCHASTIC_ROUNDING_OPTIMIZERS,
    ),
    Rule(
        "rounding by chance has not been tried over sharded tensors here",
        engines=frozenset({"fsdp2"}),
        optimizers=_STOCHASTIC_ROUNDING_OPTIMIZERS,
    ),
    Rule(
        "it holds weights in bf16, of which other arithmetic would make copies",
        optimizers=_STOCHASTIC_ROUNDING_OPTIMIZERS,
        precisions=frozenset({"fp32", "fp16"}),
    ),
    Rule(
        "bitsandbytes' kernels do not take torch's sharded tensors",
        engines=frozenset({"fsdp2"}),
        optimizers=_BITSANDBYTES_OPTIMIZERS,
    ),
    Rule(
        "DeepSpeedCPUAdam steps states in the CPU's memory, and this engine has them on the device",
        engines=frozenset(ENGINES) - _OFFLOAD_ENGINES,
        optimizers=frozenset({"deepspeed_cpu_adam"}),
    ),
    Rule(
        "states on a disk are read and written by DeepSpeed's own Adam",
        engines=_NVME_ENGINES,
        optimizers=frozenset(OPTIMIZERS) - {"deepspeed_cpu_adam"},
    ),
    Rule(
        "paged states lie in memory that a GPU's driver moves, and there is none on CPU",
        optimizers=frozenset({"paged_adamw8bit"}),
        devices=frozenset({"cpu"}),
    ),
    Rule(
        "paged states lie in the GPU's memory or where its driver moves them, and offload puts them elsewhere",
        engines=_OFFLOAD_ENGINES,
        optimizers=frozenset({"paged_adamw8bit"}),
    ),
    Rule(
        "DeepSpeed is told how many micro-batches a step has before the examples are read",
        engines=_DEEPSPEED_ENGINES,
        optional_feature=MICRO_BATCH_TOKENS,
    ),
    Rule(
        "blocks that are compiled have not been tried in the hands of this engine here",
        engines=frozenset(ENGINES) - {"single", "ddp"},
        optional_feature=COMPILE,
    ),
    Rule(
        "Liger's kernels are for CUDA",
        devices=frozenset({"cpu"}),
        optional_feature=LIGER,
    ),
    Rule(
        "fp16 is GPU arithmetic",
        precisions=frozenset({"fp16"}),
        devices=frozenset({"cpu"}),
    ),
    Rule(
        "DeepSpeed's fp16 holds weights in fp16, and the recipe's keeps them in float32",
        engines=_DEEPSPEED_ENGINES,
        precisions=frozenset({"fp16"}),
    ),
    Rule(
        "a quantised base is held in values that cannot be trained, and this method trains them",
        optional_feature=QUANTIZATION,
        methods=frozenset(METHODS) - ADAPTER_METHODS,
    ),
    Rule(
        "it shares weights out in parts, which has not been tried with the packed ones of a quantised base here",
        optional_feature=QUANTIZATION,
        engines=_SHARDED_ENGINES,
    ),
    Rule(
        "states on a disk are not in a checkpoint",
        optional_feature=CHECKPOINTING,
        engines=_NVME_ENGINES,
    ),
    Rule(
        "paged states would come back from a checkpoint unpaged",
        optional_feature=CHECKPOINTING,
        optimizers=frozenset({"paged_adamw8bit"}),
    ),
    Rule(
        "the backward pass needs weights put together from parts, and activation offload would move those",
        optional_feature=ACTIVATION_OFFLOAD,
        engines=_SHARDED_ENGINES,
    ),
    Rule(
        "all processes must put the trunk's weights together at once, and those that read its states would not",
        optional_feature=FEATURE_CACHE,
        engines=_SHARDED_ENGINES,
    ),
)
"""In the order in which they are asked; the first that refuses explains."""
_OPTIMIZER_FALLBACKS = {
    "paged_adamw8bit": ("adamw8bit",),
    "lion8bit": ("lion",),
    "adafactor": ("adamw8bit",),
    "adamw_bf16": ("adamw8bit",),
    "adamw8bit_bf16": ("adamw8bit",),
    "galore": ("adamw8bit",),
    "apollo": ("adamw8bit",),
}
"""Optimizers to try first in the place of one; for all others, and then: AdamW and its kin."""
_DEFAULT_OPTIMIZER_FALLBACKS = ("adamw", "adamw8bit", "deepspeed_cpu_adam")
_ENGINE_FALLBACKS = {
    "zero2_offload": ("zero3_offload", "zero2"),
    "zero3": ("fsdp2",),
    "zero3_offload": ("zero2_offload",),
    "zero3_nvme": ("zero3_offload",),
    "fsdp2": ("zero3",),
}
"""Engines to try first in the place of one; for all others, and then: the plainest."""
_DEFAULT_ENGINE_FALLBACKS = ("zero2", "zero2_offload", "zero3_offload", "ddp", "single")


def find_blocking_rule(combination: Combination, device: str) -> Rule | None:
    """The rule that refuses this combination on a device of this kind (cuda or cpu), None where it runs."""
    return next((rule for rule in RULES if rule.matches(combination, device)), None)


def find_nearest_supported(combination: Combination, device: str) -> list[Combination]:
    """The nearest that run on this kind of device: one thing is another, or as few as it takes; the first of each kind.

    The method stays unless nothing else helps.
    """
    tried = {
        "optimizer": (*_OPTIMIZER_FALLBACKS.get(combination.optimizer, ()), *_DEFAULT_OPTIMIZER_FALLBACKS),
        "precision": ("bf16", "fp32"),
        "engine": (*_ENGINE_FALLBACKS.get(combination.engine, ()), *_DEFAULT_ENGINE_FALLBACKS),
        "extras": tuple(combination.optional_features - {extra} for extra in sorted(combination.optional_features)),
        "method": tuple(sorted(ADAPTER_METHODS)) if QUANTIZATION in combination.optional_features else (),
    }
    for changes in range(1, len(tried) + 1):
        found = []
        for names in itertools.combinations(tried, changes):
            points = (
                replace(combination, **dict(zip(names, values, strict=True)))
                for values in itertools.product(*(tried[name] for name in names))
            )
            found += list(itertools.islice((p for p in points if find_blocking_rule(p, device) is None), 1))
        if found:
            return found
    return []


def check(combination: Combination, device: str) -> None:
    """Refuse before anything is loaded.

    Raises:
        CombinationError: it cannot run; says why, and the nearest that can.
    """
    rule = find_blocking_rule(combination, device)
    if rule is None:
        return
    more = f" with {OPTIONAL_FEATURES[rule.optional_feature][0]}" if rule.optional_feature else ""
    instead = ", or ".join(
        describe_changes(combination, point, device) for point in find_nearest_supported(combination, device)
    )
    raise CombinationError(
        f"{combination.method} with optimizer.kind={combination.optimizer} in {combination.precision}{more} does not "
        f"run on {combination.engine}: {rule.reason}; use {instead}"
    )


def describe_changes(requested: Combination, alternative: Combination, device: str) -> str:
    """How to come from one combination to another, in the words of recipes and launches."""
    knobs = {"method": "method.kind", "optimizer": "optimizer.kind", "precision": "train.precision"}
    files = {"single": "single_gpu" if device == "cuda" else "cpu", "ddp": "ddp" if device == "cuda" else "cpu2"}
    said = [
        f"{knob}={getattr(alternative, name)}"
        for name, knob in knobs.items()
        if getattr(alternative, name) != getattr(requested, name)
    ]
    if alternative.engine != requested.engine:
        said.append(f"accel_configs/{files.get(alternative.engine, alternative.engine)}.yaml")
    said += [
        "=".join(OPTIONAL_FEATURES[extra])
        for extra in sorted(requested.optional_features - alternative.optional_features)
    ]
    return " with ".join(said)


def iter_combinations(engine: str | None = None, optional_features: Iterable[str] = ()) -> Iterator[Combination]:
    """Every point of the table, or those of one engine, with what a recipe may ask for beside."""
    engines = ENGINES if engine is None else (engine,)
    for point in itertools.product(METHODS, engines, OPTIMIZERS, PRECISIONS):
        yield Combination(*point, frozenset(optional_features))
