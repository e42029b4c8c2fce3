"""model.dropout reaches every dropout of an architecture, under each family's names."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from peftbench.errors import OutOfRangeError
from peftbench.modeling.dropout import find_remaining_dropout, list_dropout_keys, set_dropout
from tests.helpers.architectures import TINY_CONFIGS

OFTEN_RENAMED = ("biogpt", "opt", "mpt", "falcon", "gpt2", "ctrl", "xglm")
"""Families whose configs name dropout in different ways."""
TAKES_ONLY_ZERO = {"mpt", "diffllama"}
"""Architectures that refuse a probability above 0."""
IGNORES_DROPOUT = {"recurrent_gemma"}
"""Architectures whose config has a probability that no module uses."""


def build_config(case: str) -> PreTrainedConfig:
    """Return a tiny config with its family's default dropout."""
    return AutoConfig.for_model(case.split(",", maxsplit=1)[0], **TINY_CONFIGS[case])


def build_on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the architecture without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]


def build_with_dropout(config: PreTrainedConfig, probability: float) -> PreTrainedModel:
    """Return the architecture with a dropout probability."""
    set_dropout(config, probability)
    return build_on_meta(config)


def test_gpt_neo_has_no_dropout_left() -> None:
    """Its config names three probabilities unlike GPT-2's."""
    keys = {"resid_dropout": 0.5, "embed_dropout": 0.5, "attention_dropout": 0.5}
    config = AutoConfig.for_model(
        "gpt_neo", hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], **keys
    )
    assert find_remaining_dropout(build_on_meta(config), 0.0) is not None
    set_dropout(config, 0.0)
    assert find_remaining_dropout(build_on_meta(config), 0.0) is None


def test_renamed_families_are_in_the_list() -> None:
    """The fast test runs on real cases."""
    assert set(OFTEN_RENAMED) <= set(TINY_CONFIGS)


@pytest.mark.parametrize(
    "case",
    [name if name in OFTEN_RENAMED else pytest.param(name, marks=pytest.mark.slow) for name in TINY_CONFIGS],
)
def test_no_dropout_remains(case: str) -> None:
    """With 0 no module drops values; with 0.5 the check finds some, so it can fail."""
    config = build_config(case)
    keys = list_dropout_keys(config)
    set_dropout(config, 0.0)
    assert find_remaining_dropout(build_on_meta(config), 0.0) is None
    if not keys or case in IGNORES_DROPOUT:
        return
    if case in TAKES_ONLY_ZERO:
        with pytest.raises((OutOfRangeError, ValueError), match="dropout"):
            build_with_dropout(config, 0.5)
        return
    note = find_remaining_dropout(build_with_dropout(config, 0.5), 0.0)
    assert note is not None
    assert note.startswith("model.dropout=0 does not turn off dropout in ")


def test_layer_dropout_is_switched_off_and_never_set() -> None:
    """OPT skips layers with its own probability: 0 switches that off, and another value leaves it."""
    config = build_config("opt")
    config.layerdrop = 0.25
    set_dropout(config, 0.1)
    assert (config.dropout, config.layerdrop) == (0.1, 0.25)
    set_dropout(config, 0.0)
    assert (config.dropout, config.layerdrop) == (0.0, 0.0)


def test_note_names_what_is_left() -> None:
    """A module that takes its probability from elsewhere is named."""
    model = build_on_meta(build_config("gpt2"))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.transformer.h[1].mlp.dropout.p = 0.3  # type: ignore[union-attr,index]
    assert (
        find_remaining_dropout(model, 0.0) == "model.dropout=0 does not turn off dropout in transformer.h.1.mlp.dropout"
    )
    assert find_remaining_dropout(model, 0.1) is None
    assert find_remaining_dropout(model, None) is None


def test_architecture_without_dropout_takes_only_zero() -> None:
    """A probability that nothing would use is refused."""
    config = build_config("bloom")
    for key in list_dropout_keys(config):
        delattr(config, key)
    set_dropout(config, 0.0)
    with pytest.raises(OutOfRangeError, match="bloom has no dropout"):
        set_dropout(config, 0.1)
