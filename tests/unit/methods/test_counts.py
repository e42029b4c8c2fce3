"""Trainable parameters of GPT-2 small, computed from its shapes without weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from peftbench.methods import METHODS
from peftbench.methods.base import Method
from peftbench.methods.full import Full
from peftbench.methods.last_layer import LastLayer
from peftbench.methods.lora import Lora
from peftbench.methods.prompt_tuning import PromptTuning
from peftbench.methods.select import Select
from peftbench.methods.select_presets import Attention, BitFit, Embeddings, LastBlocks, LayerNorm
from tests.helpers.models import meta_base
from tests.helpers.training import trainable_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

COUNTS_BY_HAND: list[tuple[Method, int]] = [
    (Full(), 124_439_808),
    (LastLayer(head="untied"), 38_597_376),  # 50,257 x 768
    (LastLayer(head="tied"), 38_597_376),
    # Everything outside transformer.h: embedding, positions (1,024 x 768) and the final norm.
    (LastLayer(head="outside_blocks"), 38_597_376 + 786_432 + 1_536),
    (Lora(r=16), 12 * 16 * ((768 + 2_304) + (768 + 768) + 2 * (768 + 3_072))),  # c_attn, c_proj, c_fc, mlp.c_proj
    (Lora(r=16, target_modules=None), 589_824),  # peft's default, c_attn: 12 layers x 16 x (768 + 2,304)
    (Lora(r=16, target_modules=None, use_dora=True), 589_824 + 12 * 2_304),
    (Lora(r=8, target_modules=("c_attn", "c_proj", "c_fc")), 12 * 8 * (768 + 2304 + 768 + 768 + 2 * (768 + 3072))),
    (PromptTuning(num_virtual_tokens=20), 15_360),  # 20 x 768
    (Select(train=r"transformer\.wpe\.weight"), 786_432),  # 1,024 x 768
    (Select(train=r"transformer\.wte\.weight|lm_head\.weight"), 38_597_376),  # one tied matrix
    (Select(train=r"transformer\.wte\.weight|lm_head\.weight", untie_head=True), 2 * 38_597_376),
    # The biases of c_attn and c_fc, and four vectors of width 768 per block; the bias of the final norm.
    (BitFit(), 12 * (2_304 + 3_072 + 4 * 768) + 768),
    (LayerNorm(), (2 * 12 + 1) * 2 * 768),
    (Embeddings(), 38_597_376),
    (LastBlocks(num_blocks=2), 2 * (12 * 768**2 + 13 * 768)),
    (Attention(), 12 * (768 * (2_304 + 768) + 2_304 + 768)),
]
"""Trainable parameters of GPT-2 small, counted by hand."""


def _plain_gpt2(_: pytest.FixtureRequest) -> PreTrainedConfig:
    from transformers import GPT2Config

    return GPT2Config()


def _hub_gpt2(request: pytest.FixtureRequest) -> PreTrainedConfig:
    from transformers import AutoConfig

    folder: Path = request.getfixturevalue("shared_data") / "gpt2"
    if not folder.is_dir():
        pytest.skip("the config of GPT-2 is not in the shared data")
    return AutoConfig.from_pretrained(folder)  # type: ignore[no-any-return]


def test_counts_cover_every_method() -> None:
    """Every method has at least one row."""
    assert METHODS
    assert {method.kind for method, _ in COUNTS_BY_HAND} == set(METHODS)


@pytest.mark.parametrize("config", [_plain_gpt2, _hub_gpt2])
@pytest.mark.parametrize(
    ("method", "expected"), COUNTS_BY_HAND, ids=[f"{m.kind}-{count}" for m, count in COUNTS_BY_HAND]
)
def test_closed_form_matches_counts_by_hand(
    method: Method,
    expected: int,
    config: Callable[[pytest.FixtureRequest], PreTrainedConfig],
    request: pytest.FixtureRequest,
) -> None:
    """The counts are equal for the default config and the published one, on the meta device."""
    base = meta_base(config(request))
    assert {parameter.device.type for parameter in base.parameters()} == {"meta"}
    assert method.trainable_parameters(base) == expected


@pytest.mark.parametrize(
    ("method", "expected"),
    [(method, count) for method, count in COUNTS_BY_HAND if method.kind != "prompt_tuning"],
    ids=[f"{m.kind}-{count}" for m, count in COUNTS_BY_HAND if m.kind != "prompt_tuning"],
)
def test_applied_method_trains_the_counted_parameters(
    method: Method, expected: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Prompt tuning is excluded: peft copies real embeddings even for a random initialization."""
    from transformers import GPT2Config

    model = method.apply(meta_base(GPT2Config()), tokenizer)
    assert sum(parameter.numel() for parameter in trainable_parameters(model).values()) == expected


def test_baselines_train_nothing() -> None:
    """The count of the base model is 0; the others have no model, so that their count raises an error."""
    from transformers import GPT2Config

    from peftbench.methods import BASELINES

    assert set(BASELINES) == {"zero_shot", "few_shot", "lead", "majority"}
    base = meta_base(GPT2Config())
    for kind, baseline_class in BASELINES.items():
        baseline = baseline_class.model_validate({})
        assert not baseline.is_trainable
        assert baseline.needs_model == (kind in {"zero_shot", "few_shot"})
        if baseline.needs_model:
            assert baseline.trainable_parameters(base) == 0
        else:
            with pytest.raises(TypeError, match=f"{kind.capitalize()} trains nothing"):
                baseline.trainable_parameters(base)
