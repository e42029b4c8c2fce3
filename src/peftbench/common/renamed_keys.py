"""Recipe keys and values that had other names before schema 2, and those that moved in schema 3."""

from __future__ import annotations

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
"""Old dotted key: new dotted key."""

MOVED_KEYS: dict[str, str] = {
    "data.separator": "task.separator",
    "data.source.article": "task.article",
    "data.source.summary": "task.summary",
    "data.source.article_tokens": "data.source.prompt_tokens",
    "data.source.summary_tokens": "data.source.completion_tokens",
}
"""Dotted key of schema 2: its place in schema 3."""

RENAMED_VALUES: dict[str, dict[str, str]] = {
    "data.padding": {"none": "free", "max_tokens": "max_length"},
    "train.logits": {"labelled": "labels_only"},
    "method.head": {"as_published": "outside_blocks"},
    "method.prompt_tuning_init": {"random": "RANDOM", "text": "TEXT", "vocabulary": "SAMPLE_VOCAB"},
}
"""Dotted key (new name): old value: new value."""
