"""Lengths and types of the fixtures that build evaluators."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from peftbench.evaluation.evaluator import Evaluator
from peftbench.methods.base import Method

NEW_TOKENS = 10
MAX_TOKENS = 48

BuildEvaluator = Callable[..., Evaluator]
ApplyMethod = Callable[[Method, str], nn.Module]
