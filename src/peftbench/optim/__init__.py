"""OPTIMIZERS: the optimizers that a recipe can choose. An optimizer receives only parameters that require gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Discriminator, Tag

from peftbench.optim.base import Optimizer
from peftbench.optim.bitsandbytes import AdamW8bit, AdamW32bit, Lion, Lion8bit, PagedAdamW8bit
from peftbench.optim.deepspeed_cpu import DeepSpeedCPUAdam
from peftbench.optim.lisa import Lisa
from peftbench.optim.lora_fa import LoraFA
from peftbench.optim.lora_plus import LoraPlus
from peftbench.optim.low_rank import Apollo, GaLore
from peftbench.optim.muon import Muon
from peftbench.optim.schedule_free import ScheduleFree
from peftbench.optim.stochastic_rounding import AdamW8bitBf16, AdamWBf16
from peftbench.optim.torch_optimizers import SGD, Adafactor, AdamW

__all__ = [
    "OPTIMIZERS",
    "OPTIMIZER_LIBRARIES",
    "SGD",
    "Adafactor",
    "AdamW",
    "AdamW8bit",
    "AdamW8bitBf16",
    "AdamW32bit",
    "AdamWBf16",
    "AnyOptimizer",
    "Apollo",
    "DeepSpeedCPUAdam",
    "GaLore",
    "Lion",
    "Lion8bit",
    "Lisa",
    "LoraFA",
    "LoraPlus",
    "Muon",
    "Optimizer",
    "PagedAdamW8bit",
    "ScheduleFree",
]

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adamw": AdamW,
    "sgd": SGD,
    "adafactor": Adafactor,
    "lion": Lion,
    "adamw8bit": AdamW8bit,
    "paged_adamw8bit": PagedAdamW8bit,
    "lion8bit": Lion8bit,
    "adamw32bit": AdamW32bit,
    "adamw_bf16": AdamWBf16,
    "adamw8bit_bf16": AdamW8bitBf16,
    "deepspeed_cpu_adam": DeepSpeedCPUAdam,
    "galore": GaLore,
    "apollo": Apollo,
    "muon": Muon,
    "schedule_free": ScheduleFree,
    "lisa": Lisa,
    "lora_plus": LoraPlus,
    "lora_fa": LoraFA,
}

OPTIMIZER_LIBRARIES = tuple(dict.fromkeys(optimizer.library for optimizer in OPTIMIZERS.values()))
"""Distributions that implement them, for a record's library versions."""

if TYPE_CHECKING:
    AnyOptimizer = Optimizer
else:
    # Options without a kind are those of the default optimizer.
    AnyOptimizer = Annotated[
        Union[tuple(Annotated[optimizer, Tag(kind)] for kind, optimizer in OPTIMIZERS.items())],
        Discriminator(
            lambda options: (
                options.get("kind", "adamw") if isinstance(options, dict) else getattr(options, "kind", None)
            )
        ),
    ]
