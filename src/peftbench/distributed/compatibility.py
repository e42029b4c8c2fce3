"""The compatibility table: which method, optimizer, precision and optional feature runs on which engine.

Tests and docs are generated from it. tests/distributed/ runs every combination that no rule refuses on CPU, with two
processes if the engine supports several.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from peftbench.distributed.engines import ENGINES, EngineKind
from peftbench.errors import CombinationError
from peftbench.methods import METHOD_FAMILIES, METHODS
from peftbench.methods.base import Method
from peftbench.methods.peft_kinds import LORA_KINDS
from peftbench.optim import OPTIMIZERS, Optimizer

PRECISIONS = ("fp32", "bf16", "fp16")
ACCEL_CONFIG_DIR = "accel_configs/"
QUANTIZATION, CHECKPOINTING, ACTIVATION_OFFLOAD = "quantization", "checkpointing", "activation_offloading"
MICRO_BATCH_TOKENS, COMPILE, LIGER = "micro_batch_tokens", "compile", "liger"
FEATURE_CACHE = "feature_cache"
TRIED_METHOD, NO_LORA, GRADIENT_READER = "tried_method", "no_lora", "gradient_reader"
FROZEN_BF16, FROZEN_FP16 = "frozen_bf16", "frozen_fp16"
OPTIONAL_FEATURES = {
    ACTIVATION_OFFLOAD: ("train.activation_offloading", "false"),
    CHECKPOINTING: ("checkpoint.interval", "null"),
    COMPILE: ("train.compile", "false"),
    LIGER: ("train.cross_entropy", "torch"),
    MICRO_BATCH_TOKENS: ("train.micro_batch_tokens", "null"),
    QUANTIZATION: ("model.quantization", "null"),
    FEATURE_CACHE: ("train.feature_cache", "null"),
    TRIED_METHOD: ("method.kind", "lora"),
    NO_LORA: ("method.kind", "lora"),
    GRADIENT_READER: ("method.kind", "lora"),
    FROZEN_BF16: ("model.dtype", "auto"),  # auto is a type that runs
    FROZEN_FP16: ("model.dtype", "auto"),
}
"""Optional features of a recipe: the key of each, and the value that disables it."""
FROZEN_DTYPES = {"bf16": FROZEN_BF16, "fp16": FROZEN_FP16}
"""The feature of each 16-bit type in which frozen weights may be held."""
METHOD_FEATURES = {
    TRIED_METHOD: "types of peft",
    NO_LORA: "types of peft other than LoRA",
    GRADIENT_READER: "adalora",
}
"""Features that a method has because of its kind, and the methods that have them."""


def _engines(condition: Callable[[EngineKind], bool]) -> frozenset[str]:
    return frozenset(name for name, engine in ENGINES.items() if condition(engine))


def _optimizers(condition: Callable[[type[Optimizer]], bool]) -> frozenset[str]:
    return frozenset(name for name, optimizer in OPTIMIZERS.items() if condition(optimizer))


def _families(condition: Callable[[type[Method]], bool]) -> frozenset[str]:
    """Return the families of methods that meet ``condition``.

    Raises:
        TypeError: only some methods of a family do, so that one row of the table would not describe all of them.
    """
    families, others = (
        frozenset(method.family for method in METHODS.values() if condition(method) is value) for value in (True, False)
    )
    if mixed := families & others:
        raise TypeError(f"the methods of the family {min(mixed)} differ in an attribute; give them two families")
    return families


def _group_by_limitation(limitations: Mapping[str, str | None]) -> dict[str, frozenset[str]]:
    """Return the names with each limitation, without those that have none."""
    groups: dict[str, frozenset[str]] = {}
    for name, limitation in limitations.items():
        if limitation is not None:
            groups[limitation] = groups.get(limitation, frozenset()) | {name}
    return groups


def _get_quantization_limitation(method: type[Method]) -> str | None:
    if method.supports_quantized_base:
        return None
    if method.keeps_base_frozen:
        return "this method is untested with a quantized base model"
    return "quantized weights cannot be trained, and this method trains weights of the base model"


_DEEPSPEED_ENGINES = _engines(lambda engine: engine.is_deepspeed)
_FSDP_ENGINES = _engines(lambda engine: engine.is_fsdp)
_OFFLOAD_ENGINES = _engines(lambda engine: engine.offload_optimizer != "none")
_SHARDED_ENGINES = _engines(lambda engine: engine.shards_weights)
_NVME_ENGINES = _engines(lambda engine: engine.offloads_to_nvme)
_STOCHASTIC_ROUNDING_OPTIMIZERS = _optimizers(lambda optimizer: optimizer.weight_dtype == "bf16")
_PAGED_OPTIMIZERS = _optimizers(lambda optimizer: optimizer.is_paged)
_FREEZING_METHODS = _families(lambda method: method.freezes_weights)
_LORA_OPTIMIZERS = _optimizers(lambda optimizer: optimizer.needs_lora)
_NEEDS_LORA = (
    f"this optimizer needs the matrices A and B of LoRA, which these kinds of method have: {', '.join(LORA_KINDS)}"
)
_QUANTIZABLE_METHODS = _families(lambda method: method.supports_quantized_base)


@dataclass(frozen=True)
class Combination:
    """One point of the table."""

    method: str
    """Family of the method."""
    engine: str
    optimizer: str
    precision: str
    optional_features: frozenset[str] = frozenset()
    kind: str | None = field(default=None, compare=False)
    """The recipe's ``method.kind``, for messages; None for the first kind of the family."""

    @property
    def name(self) -> str:
        """Name of the family, optimizer and precision, valid as a folder's name."""
        return f"{self.method}-{self.optimizer}-{self.precision}"


def name_feature(feature: str) -> str:
    """Return the recipe key of an optional feature, with its value if another value of the key is another feature."""
    if feature in METHOD_FEATURES:
        return f"method.kind: {METHOD_FEATURES[feature]}"
    value = next((f"={dtype}" for dtype, name in FROZEN_DTYPES.items() if name == feature), "")
    return OPTIONAL_FEATURES[feature][0] + value


@dataclass(frozen=True)
class Rule:
    """A set of combinations that are refused, and the reason. A field that is None matches every value."""

    reason: str
    engines: frozenset[str] | None = None
    optimizers: frozenset[str] | None = None
    precisions: frozenset[str] | None = None
    methods: frozenset[str] | None = None
    """Families of methods."""
    devices: frozenset[str] | None = None
    optional_feature: str | None = None
    """Matches only recipes that use this feature."""

    def describe_refused(self, combination: Combination, device: str) -> str:
        """Return the values of ``combination`` that the rule refuses together, and where, as one sentence."""
        values = [
            f"{key}={value}"
            for key, value, allowed in (
                ("method.kind", combination.kind or METHOD_FAMILIES[combination.method][0], self.methods),
                ("optimizer.kind", combination.optimizer, self.optimizers),
                ("train.precision", combination.precision, self.precisions),
            )
            if allowed is not None
        ]
        if self.optional_feature:
            is_method = self.optional_feature in METHOD_FEATURES
            values.append(f"method.kind={combination.kind}" if is_method else name_feature(self.optional_feature))
        engine = "a single process" if combination.engine == "single" else combination.engine
        places = [f" with {engine}"] if self.engines is not None else []
        places += [" on CPU" if device == "cpu" else " on a GPU"] if self.devices is not None else []
        return f"{' with '.join(values) or 'this recipe'} does not run{''.join(places)}"

    def matches(self, combination: Combination, device: str) -> bool:
        """True if the rule refuses this combination on this type of device."""
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
        "DeepSpeed ZeRO flattens the weights into vectors, and this optimizer needs matrices",
        engines=_DEEPSPEED_ENGINES,
        optimizers=_optimizers(lambda optimizer: optimizer.needs_matrices),
    ),
    *(
        Rule(limitation, engines=_DEEPSPEED_ENGINES, optimizers=optimizers)
        for limitation, optimizers in _group_by_limitation(
            {name: optimizer.deepspeed_limitation for name, optimizer in OPTIMIZERS.items()}
        ).items()
    ),
    *(
        Rule(limitation, engines=_FSDP_ENGINES, optimizers=optimizers)
        for limitation, optimizers in _group_by_limitation(
            {name: optimizer.dtensor_limitation for name, optimizer in OPTIMIZERS.items()}
        ).items()
    ),
    *(
        Rule(limitation, engines=frozenset({"ddp"}), optimizers=optimizers)
        for limitation, optimizers in _group_by_limitation(
            {name: optimizer.ddp_limitation for name, optimizer in OPTIMIZERS.items()}
        ).items()
    ),
    Rule(
        "this optimizer chooses which blocks to freeze, so the method must train all weights",
        optimizers=_optimizers(lambda optimizer: optimizer.freezes_blocks),
        methods=_FREEZING_METHODS,
    ),
    Rule(
        _NEEDS_LORA,
        optimizers=_LORA_OPTIMIZERS,
        methods=_families(lambda method: not method.adds_lora),
    ),
    Rule(_NEEDS_LORA, optimizers=_LORA_OPTIMIZERS, optional_feature=NO_LORA),
    Rule(
        "stochastic rounding draws different random numbers on each rank, so that the replicas would diverge",
        engines=frozenset({"ddp"}),
        optimizers=_STOCHASTIC_ROUNDING_OPTIMIZERS,
    ),
    Rule(
        "ZeRO steps float32 copies of the weights, which need no stochastic rounding",
        engines=_DEEPSPEED_ENGINES,
        optimizers=_STOCHASTIC_ROUNDING_OPTIMIZERS,
    ),
    Rule(
        "this optimizer keeps the weights in bf16, and another precision would convert them to copies",
        optimizers=_STOCHASTIC_ROUNDING_OPTIMIZERS,
        precisions=frozenset({"fp32", "fp16"}),
    ),
    Rule(
        "DeepSpeedCPUAdam steps states in CPU memory, and this engine keeps them on the device",
        engines=frozenset(ENGINES) - _OFFLOAD_ENGINES,
        optimizers=_optimizers(lambda optimizer: optimizer.is_cpu_only),
    ),
    Rule(
        "only DeepSpeed's own Adam steps states on disk",
        engines=_NVME_ENGINES,
        optimizers=_optimizers(lambda optimizer: optimizer.library != "deepspeed"),
    ),
    Rule(
        "paged states need CUDA unified memory, which a CPU lacks",
        optimizers=_PAGED_OPTIMIZERS,
        devices=frozenset({"cpu"}),
    ),
    Rule(
        "the GPU's driver places paged states, and this engine offloads states itself",
        engines=_OFFLOAD_ENGINES,
        optimizers=_PAGED_OPTIMIZERS,
    ),
    Rule(
        "DeepSpeed needs the number of micro-batches in a step before the examples are read",
        engines=_DEEPSPEED_ENGINES,
        optional_feature=MICRO_BATCH_TOKENS,
    ),
    Rule(
        "compiled blocks are untested on this engine",
        engines=frozenset(ENGINES) - {"single", "ddp"},
        optional_feature=COMPILE,
    ),
    Rule(
        "Liger's kernels need CUDA",
        devices=frozenset({"cpu"}),
        optional_feature=LIGER,
    ),
    Rule(
        "fp16 needs a GPU",
        precisions=frozenset({"fp16"}),
        devices=frozenset({"cpu"}),
    ),
    Rule(
        "DeepSpeed's fp16 keeps the weights in fp16, and the recipe's fp16 keeps them in float32",
        engines=_DEEPSPEED_ENGINES,
        precisions=frozenset({"fp16"}),
    ),
    *(
        Rule(
            f"DeepSpeed swaps all weights through buffers of one type, so that weights frozen in {dtype} would round "
            "the trained ones",
            engines=_NVME_ENGINES,
            methods=_FREEZING_METHODS,
            optional_feature=feature,
        )
        for dtype, feature in FROZEN_DTYPES.items()
    ),
    *(
        Rule(
            f"weights frozen in {dtype} are multiplied in {dtype}, so that train.precision must be {dtype} too",
            precisions=frozenset(PRECISIONS) - {dtype},
            methods=_FREEZING_METHODS,
            optional_feature=feature,
        )
        for dtype, feature in FROZEN_DTYPES.items()
    ),
    *(
        Rule(limitation, optional_feature=QUANTIZATION, methods=methods)
        for limitation, methods in _group_by_limitation(
            {method.family: _get_quantization_limitation(method) for method in METHODS.values()}
        ).items()
    ),
    Rule(
        "this engine shards the weights, and sharding packed weights of a quantized base model is untested",
        optional_feature=QUANTIZATION,
        engines=_SHARDED_ENGINES,
    ),
    Rule(
        "this optimizer evaluates weights averaged over steps, in which ranks that this method masked are not zero",
        optional_feature=GRADIENT_READER,
        optimizers=_optimizers(lambda optimizer: optimizer.averages_weights),
    ),
    Rule(
        "DeepSpeed deletes the gradients inside its step, and this method reads them after it",
        optional_feature=GRADIENT_READER,
        engines=_DEEPSPEED_ENGINES,
    ),
    Rule(
        "this engine shards the gradients, and this method needs whole ones",
        optional_feature=GRADIENT_READER,
        engines=_FSDP_ENGINES,
    ),
    Rule(
        "this engine shards the weights, and types of peft other than LoRA and prompt tuning are untested there",
        optional_feature=TRIED_METHOD,
        engines=_SHARDED_ENGINES,
    ),
    Rule(
        "checkpoints do not include states on disk",
        optional_feature=CHECKPOINTING,
        engines=_NVME_ENGINES,
    ),
    Rule(
        "paged states would be restored from a checkpoint as unpaged ones",
        optional_feature=CHECKPOINTING,
        optimizers=_PAGED_OPTIMIZERS,
    ),
    Rule(
        "the backward pass gathers sharded weights, and activation offloading would move them to the CPU",
        optional_feature=ACTIVATION_OFFLOAD,
        engines=_SHARDED_ENGINES,
    ),
    Rule(
        "all processes must gather the backbone's weights together, and those that read cached features would not",
        optional_feature=FEATURE_CACHE,
        engines=_SHARDED_ENGINES,
    ),
)
"""Ordered: the first rule that refuses a combination gives the reason."""
FALLBACKS: dict[str, dict[str | None, tuple[str, ...]]] = {
    "optimizer": {
        **{name: optimizer.fallbacks for name, optimizer in OPTIMIZERS.items()},
        None: tuple(name for name, optimizer in OPTIMIZERS.items() if optimizer.is_common_fallback),
    },
    "engine": {
        **{name: engine.fallbacks for name, engine in ENGINES.items()},
        None: ("zero2", "zero2_offload", "zero3_offload", "ddp", "single"),
    },
    "precision": {None: ("bf16", "fp32")},
}
"""Alternatives to a value in the order to try them: those of the value itself, then those of None."""


def find_blocking_rule(combination: Combination, device: str) -> Rule | None:
    """Return the rule that refuses this combination on a device of this type (cuda or cpu), None if it runs."""
    return next((rule for rule in RULES if rule.matches(combination, device)), None)


def find_nearest_supported(combination: Combination, device: str) -> list[Combination]:
    """Return the nearest combinations that run on this type of device.

    These change as few parts as possible; for each set of changed parts it is the first that runs.

    The method changes only if a quantized base model requires it.
    """
    features = combination.optional_features
    alternatives: dict[str, tuple[str | frozenset[str], ...]] = {
        "optimizer": _list_fallbacks("optimizer", combination.optimizer),
        "precision": _list_fallbacks("precision", combination.precision),
        "engine": _list_fallbacks("engine", combination.engine),
        "optional_features": tuple(features - {feature} for feature in OPTIONAL_FEATURES if feature in features),
        "method": tuple(sorted(_QUANTIZABLE_METHODS)) if QUANTIZATION in features else (),
    }
    for num_changes in range(1, len(alternatives) + 1):
        nearest = []
        for names in itertools.combinations(alternatives, num_changes):
            candidates = (
                replace(combination, **dict(zip(names, values, strict=True)))  # type: ignore[arg-type]
                for values in itertools.product(*(alternatives[name] for name in names))
            )
            nearest += list(itertools.islice((c for c in candidates if find_blocking_rule(c, device) is None), 1))
        if nearest:
            return nearest
    return []


def _list_fallbacks(part: str, value: str) -> tuple[str, ...]:
    return (*FALLBACKS[part].get(value, ()), *FALLBACKS[part][None])


def check(combination: Combination, device: str) -> None:
    """Check a combination before anything is loaded.

    Raises:
        CombinationError: it does not run; the message has the reason and the nearest combinations that do.
    """
    rule = find_blocking_rule(combination, device)
    if rule is None:
        return
    changes = [
        describe_changes(combination, nearest, device) for nearest in find_nearest_supported(combination, device)
    ]
    alternatives = ", or ".join(
        f"the accelerate config {change}" if change.startswith(ACCEL_CONFIG_DIR) else change for change in changes
    )
    raise CombinationError(f"{rule.describe_refused(combination, device)}: {rule.reason}; use {alternatives}")


def describe_changes(requested: Combination, alternative: Combination, device: str) -> str:
    """Describe the changes from one combination to another as recipe keys and an accelerate config."""
    keys = {"optimizer": "optimizer.kind", "precision": "train.precision"}
    configs = {"single": "single_gpu" if device == "cuda" else "cpu", "ddp": "ddp" if device == "cuda" else "cpu2"}
    is_same_method = alternative.method == requested.method
    changes = [] if is_same_method else [f"method.kind={METHOD_FAMILIES[alternative.method][0]}"]
    changes += [
        f"{key}={getattr(alternative, name)}"
        for name, key in keys.items()
        if getattr(alternative, name) != getattr(requested, name)
    ]
    if alternative.engine != requested.engine:
        changes.append(f"{ACCEL_CONFIG_DIR}{configs.get(alternative.engine, alternative.engine)}.yaml")
    changes += [
        f"{key}={value}"
        for feature, (key, value) in OPTIONAL_FEATURES.items()
        if feature in requested.optional_features - alternative.optional_features
    ]
    return " with ".join(changes)


def iter_combinations(engine: str | None = None, optional_features: Iterable[str] = ()) -> Iterator[Combination]:
    """Yield every combination of a family of methods, or those of one engine, with these optional features."""
    engines = ENGINES if engine is None else (engine,)
    for values in itertools.product(METHOD_FAMILIES, engines, OPTIMIZERS, PRECISIONS):
        yield Combination(*values, frozenset(optional_features))
