"""Recipe keys and values of earlier schemas that have other names now, were moved, or were replaced."""

from __future__ import annotations

from typing import Any

RENAMED_KEYS: dict[str, str] = {
    "train.micro_batch": "train.micro_batch_size",
    "train.micro_tokens": "train.micro_batch_tokens",
    "train.global_batch": "train.global_batch_size",
    "train.trunk_cache": "train.feature_cache",
    "train.activation_offload": "train.activation_offloading",
    "data.max_tokens": "data.max_length",
    "data.too_long": "data.overlong",
    "data.as_published": "data.label_padding",
    "evaluate.batch": "evaluate.batch_size",
    "evaluate.beams": "evaluate.num_beams",
    "evaluate.resamples": "evaluate.bootstrap_resamples",
    "evaluate.samples": "evaluate.saved_samples",
    "checkpoint.every_steps": "checkpoint.interval",
    "checkpoint.keep": "checkpoint.keep_latest",
    "profile.warmup_steps": "profile.untimed_steps",
    "profile.breakdown": "profile.memory_breakdown",
    "method.alpha": "method.lora_alpha",
    "method.dropout": "method.lora_dropout",
    "method.tokens": "method.num_virtual_tokens",
    "method.init": "method.prompt_tuning_init",
    "method.init_text": "method.prompt_tuning_init_text",
}
"""Dotted key of schema 1: dotted key of schema 2."""

MOVED_KEYS: dict[str, str] = {
    "data.separator": "task.separator",
    "data.source.article": "task.article",
    "data.source.summary": "task.summary",
    "data.source.article_tokens": "data.source.prompt_tokens",
    "data.source.summary_tokens": "data.source.completion_tokens",
}
"""Dotted key of schema 2: its place in schema 3."""

TASK_OF_SCHEMA_2 = {"kind": "summarization", "article": "article", "summary": "summary", "separator": "\nTL;DR:"}
"""The task that every recipe of schema 2 had, with its defaults."""

RENAMED_VALUES: dict[str, dict[str, str]] = {
    "data.padding": {"none": "free", "max_tokens": "max_length"},
    "train.logits": {"labelled": "labels_only"},
    "method.head": {"as_published": "outside_blocks"},
    "method.prompt_tuning_init": {"random": "RANDOM", "text": "TEXT", "vocabulary": "SAMPLE_VOCAB"},
}
"""Dotted key (new name): old value: new value."""

REPLACED_SWITCHES: dict[str, tuple[str, dict[bool, Any]]] = {
    "evaluate.generate": ("evaluate.metrics", {True: None, False: []}),
}
"""Dotted key of schema 2, a boolean: the key that replaced it, and its value for each value of the old key."""
