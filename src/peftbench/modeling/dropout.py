"""Dropout of the base model: set in its config under each family's own names, and checked in the model."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from peftbench.errors import OutOfRangeError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_DROPOUT_KEY = re.compile(r"(drop|dropout|pdrop)(_p|_prob|_rate)?$")
_LAYER_DROPOUT_KEY = re.compile(r"layer_?drop$")
"""The probability that a whole layer is skipped: another technique, which 0 switches off too."""
_HEAD_KEYS = ("classifier", "summary")
"""Prefixes of dropout in heads that a causal language model does not have."""


def set_dropout(config: PreTrainedConfig, probability: float) -> None:
    """Set every dropout probability in ``config``, also in its nested configs.

    Raises:
        OutOfRangeError: the architecture has no dropout and ``probability`` is above 0.
    """
    sections = [config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))]
    keys = [(section, key) for section in sections for key in list_dropout_keys(section)]
    if not keys and probability > 0:
        raise OutOfRangeError(
            f"{config.model_type} has no dropout, but model.dropout={probability}; set model.dropout=null"
        )
    for section, key in keys:
        value = int(probability) if isinstance(getattr(section, key), int) and not probability % 1 else probability
        try:
            setattr(section, key, value)
        except Exception as error:  # of a library of transformers; MPT's config takes whole numbers only
            raise OutOfRangeError(
                f"{config.model_type} does not take model.dropout={probability}; set model.dropout=0 or null"
            ) from error
    if probability == 0:
        for section in sections:
            for key in filter(_LAYER_DROPOUT_KEY.search, vars(section)):
                setattr(section, key, 0.0)


def list_dropout_keys(section: object) -> list[str]:
    """Return the names of the dropout probabilities in a config."""
    return [
        key
        for key, value in vars(section).items()
        if _DROPOUT_KEY.search(key)
        and not _LAYER_DROPOUT_KEY.search(key)
        and not key.startswith(_HEAD_KEYS)
        and isinstance(value, (int, float))
        and not isinstance(value, bool)
    ]


def find_remaining_dropout(model: PreTrainedModel, probability: float | None) -> str | None:
    """Return a note that names the modules that drop values although ``probability`` is 0; None if there are none."""
    from torch import nn

    if probability != 0:
        return None
    active = {
        f"{type(module).__name__}.{name}" if not isinstance(module, nn.Dropout) else module_name
        for module_name, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, (int, float))
        and value > 0
        and ((isinstance(module, nn.Dropout) and name == "p") or _DROPOUT_KEY.search(name))
    }
    names = sorted(active)
    return f"model.dropout=0 does not turn off dropout in {', '.join(names[:5])}" if names else None
