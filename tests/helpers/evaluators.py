"""Lengths and types of the fixtures that build evaluators."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from peftbench.evaluation.evaluator import Evaluator, add_scores, build_quality
from peftbench.evaluation.outputs import build_outputs
from peftbench.methods.base import Method
from peftbench.record import Quality

NEW_TOKENS = 10
MAX_TOKENS = 48

BuildEvaluator = Callable[..., Evaluator]
ApplyMethod = Callable[[Method, str], nn.Module]


def evaluate_all(evaluator: Evaluator) -> Quality:
    """Return the quality that a run records."""
    config, dataset = evaluator.config, evaluator.dataset
    held_out = evaluator.compute_held_out_loss()
    forced = evaluator.decode_teacher_forced() if config.teacher_forced else None
    generated = evaluator.generate_summaries() if config.generate else None
    quality = build_quality(config, dataset, generated, held_out=held_out)
    return add_scores(config, quality, build_outputs(dataset, generated, forced))
