"""The models and recipes that measure.py measures."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peftbench.data.synthetic import Synthetic
from peftbench.methods import METHODS
from peftbench.methods.full import Full
from peftbench.optim import OPTIMIZERS
from peftbench.recipe.schema import Budget, Data, Evaluate, Model, Profile, Recipe, Train

NUM_VIRTUAL_TOKENS = 20


@dataclass(frozen=True)
class Size:
    """A model and the shape of its training data."""

    config: dict[str, Any]
    source: Synthetic
    rows: int
    width: int
    """Real tokens per row; virtual tokens are added within the model's positions."""
    untimed_steps: int
    steps: int


class RandomTokens:
    """Random tokens with the source's lengths; the prompt of an overlong row is truncated."""

    def __init__(self, size: Size, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.label_spans: list[list[int]] = []
        self.ids: list[list[int]] = []
        for sampled, completion in size.source.sample_lengths("train"):
            prompt = min(sampled, size.width - completion)
            self.label_spans.append([prompt, prompt + completion])
            self.ids.append(torch.randint(vocabulary, (prompt + completion,), generator=generator).tolist())

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, indices: list[int], /) -> Mapping[str, Sequence[Any]]:
        return {"input_ids": [self.ids[i] for i in indices], "label_spans": [self.label_spans[i] for i in indices]}


CNN_DAILYMAIL = Synthetic(examples=256)
SIZES = {
    "gpt2": Size({}, CNN_DAILYMAIL, 6, 1024 - NUM_VIRTUAL_TOKENS, 6, 15),
    "gpt2-medium": Size(
        {"n_layer": 24, "n_embd": 1024, "n_head": 16}, CNN_DAILYMAIL, 6, 1024 - NUM_VIRTUAL_TOKENS, 6, 15
    ),
}
TINY = {
    "tiny": Size(
        {
            "n_layer": 2,
            "n_embd": 64,
            "n_head": 2,
            "vocab_size": 512,
            "n_positions": 64,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        Synthetic(examples=24, prompt_tokens=(9, 60), completion_tokens=(3, 9)),
        4,
        64 - NUM_VIRTUAL_TOKENS,
        2,
        4,
    ),
}
LADDER = {
    "gpt2": SIZES["gpt2"],
    "gpt2-medium": SIZES["gpt2-medium"],
    "gpt2-large": Size(
        {"n_layer": 36, "n_embd": 1280, "n_head": 20}, CNN_DAILYMAIL, 6, 1024 - NUM_VIRTUAL_TOKENS, 6, 15
    ),
    "gpt2-xl": Size({"n_layer": 48, "n_embd": 1600, "n_head": 25}, CNN_DAILYMAIL, 6, 1024 - NUM_VIRTUAL_TOKENS, 6, 15),
}
CARD = "16GiB"
"""Memory budget of the ladder's runs."""
STEPS: dict[str, dict[str, Any]] = {
    "fp32": {
        "precision": "fp32",
        "logits": "all",
        "fused_gelu": False,
        "optimizer": "adamw",
        "checkpointing": False,
    },
    "bf16": {"precision": "bf16"},
    "labels_only": {"logits": "labels_only"},
    "fused_gelu": {"fused_gelu": True},
    "adamw8bit": {"optimizer": "adamw8bit"},
    "checkpointing": {"checkpointing": True},
    "bf16_weights": {"optimizer": "adamw8bit_bf16"},
}
"""Each step adds to the previous one, as in recipes/budget16."""


MEASURED_METHODS = ("full", "last_layer", "lora", "prompt_tuning")


def iter_method_cases(sizes: Mapping[str, Size], folder: str) -> Iterator[tuple[Recipe, Size]]:
    """Yield each measured method in both precisions, with and without checkpointing (not over a frozen backbone)."""
    method_keys: dict[str, dict[str, Any]] = {"prompt_tuning": {"num_virtual_tokens": NUM_VIRTUAL_TOKENS}}
    methods = [METHODS[name](**method_keys.get(name, {})) for name in MEASURED_METHODS]
    cases = itertools.product(sizes.items(), ("bf16", "fp32"), (False, True), methods)
    for (model, size), precision, checkpointing, method in cases:
        if checkpointing and method.has_frozen_backbone:
            continue
        yield (
            Recipe(
                name=f"{model}_{method.kind}_{precision}" + "_checkpointing" * checkpointing,
                output_dir=folder,
                model=Model(path=model, init="random", attention="sdpa", dtype="fp32"),
                method=method,
                data=Data(source=size.source, max_length=size.width, padding="max_length"),
                train=Train(
                    steps=size.untimed_steps + size.steps,
                    global_batch_size=size.rows,
                    precision=precision,
                    gradient_checkpointing=checkpointing,
                ),
                evaluate=Evaluate(metrics=()),
                profile=Profile(untimed_steps=size.untimed_steps, memory_breakdown=True),
                save_model=False,
            ),
            size,
        )


def iter_ladder_cases(sizes: Mapping[str, Size], folder: str) -> Iterator[tuple[Recipe, Size]]:
    """Yield full fine-tuning with one more memory technique per step, on every size, within a card's memory."""
    for model, size in sizes.items():
        settings: dict[str, Any] = {}
        for index, (step, change) in enumerate(STEPS.items()):
            settings = settings | change
            yield (
                Recipe(
                    name=f"{model}_{index}_{step}",
                    output_dir=folder,
                    model=Model(
                        path=model,
                        init="random",
                        attention="sdpa",
                        fused_gelu=settings["fused_gelu"],
                        dtype="fp32",
                    ),
                    method=Full(),
                    data=Data(source=size.source, max_length=size.width, padding="max_length"),
                    optimizer=OPTIMIZERS[settings["optimizer"]](kind=settings["optimizer"]),
                    train=Train(
                        steps=size.untimed_steps + size.steps,
                        global_batch_size=size.rows,
                        precision=settings["precision"],
                        gradient_checkpointing=settings["checkpointing"],
                        logits=settings["logits"],
                    ),
                    evaluate=Evaluate(metrics=()),
                    profile=Profile(untimed_steps=size.untimed_steps),
                    budget=Budget(memory=CARD),
                    save_model=False,
                ),
                size,
            )


def cases(*, tiny: bool, folder: str = "") -> Iterator[tuple[Recipe, Size]]:
    """Yield all cases: methods first, then the ladder, which needs a GPU."""
    yield from iter_method_cases(TINY if tiny else SIZES, folder)
    if not tiny:
        yield from iter_ladder_cases(LADDER, folder)
