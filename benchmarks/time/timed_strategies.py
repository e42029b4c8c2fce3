"""The strategies whose step time is predicted and measured: methods, micro-batches, memory techniques, precisions."""

from __future__ import annotations

from typing import Any

from peftbench.methods import METHODS
from peftbench.optim import OPTIMIZERS
from peftbench.recipe.schema import Data, Evaluate, Model, Profile, Recipe, Train

UNTIMED_STEPS, TIMED_STEPS = 3, 9
COMPLETION_WORDS = 40
TOKENS = 160
"""Every row has this many positions, so that a step's operations are known."""
SETTINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "full, micro-batch 2": {"train": {"micro_batch_size": 2}},
    "full, checkpointing": {"train": {"gradient_checkpointing": True}},
    "full, adamw8bit": {"optimizer": "adamw8bit"},
    "full, all logits": {"train": {"logits": "all"}},
    "full, bf16": {"train": {"precision": "bf16"}},
    "full, 4 rows of 320": {"train": {"global_batch_size": 4}, "tokens": 2 * TOKENS},
    "lora": {"method": {"kind": "lora"}},
    "lora, rank 64": {"method": {"kind": "lora", "r": 64, "lora_alpha": 128.0}},
    "lora, micro-batch 2": {"method": {"kind": "lora"}, "train": {"micro_batch_size": 2}},
    "lora, checkpointing": {"method": {"kind": "lora"}, "train": {"gradient_checkpointing": True}},
    "lora, bf16": {"method": {"kind": "lora"}, "train": {"precision": "bf16"}},
    "prompt tuning": {"method": {"kind": "prompt_tuning"}},
    "prompt tuning, micro-batch 2": {"method": {"kind": "prompt_tuning"}, "train": {"micro_batch_size": 2}},
    "last layer": {"method": {"kind": "last_layer"}},
    "last layer, all logits": {"method": {"kind": "last_layer"}, "train": {"logits": "all"}},
    "last layer, micro-batch 2": {"method": {"kind": "last_layer"}, "train": {"micro_batch_size": 2}},
    "last layer, bf16": {"method": {"kind": "last_layer"}, "train": {"precision": "bf16"}},
}
FOUR_METHODS = ("full", "lora", "prompt tuning", "last layer")


def build_recipe(name: str, output_dir: str = "") -> Recipe:
    """Return the recipe of one strategy: the shipped base, synthetic rows of one length."""
    changes = SETTINGS[name]
    tokens = changes.get("tokens", TOKENS)
    method = dict(changes.get("method", {"kind": "full"}))
    optimizer = changes.get("optimizer", "adamw")
    lengths = {"prompt_tokens": (tokens // 2, tokens // 2), "completion_tokens": (COMPLETION_WORDS, COMPLETION_WORDS)}
    return Recipe(
        name=name.replace(", ", "_").replace(" ", "_"),
        output_dir=output_dir,
        model=Model(path="shipped", dropout=0.0, dtype="fp32"),
        method=METHODS[method.pop("kind")](**method),
        data=Data(source={"kind": "synthetic", "examples": 128, **lengths}, max_length=tokens, padding="max_length"),
        optimizer=OPTIMIZERS[optimizer](kind=optimizer),
        train=Train(
            **{
                "steps": UNTIMED_STEPS + TIMED_STEPS,
                "global_batch_size": 8,
                "micro_batch_size": 8,
                "precision": "fp32",
                **changes.get("train", {}),
            }
        ),
        evaluate=Evaluate(metrics=()),
        profile=Profile(untimed_steps=UNTIMED_STEPS),
        save_model=False,
    )
