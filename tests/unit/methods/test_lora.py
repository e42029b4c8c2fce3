"""LoRA: merged weights, initialization, scaling and target modules."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from peftbench.errors import TargetModulesError, UnsupportedModelError
from peftbench.methods.lora import Lora
from peftbench.training.loop import train_step
from tests.helpers.batches import logits, micro_batch, one_batch
from tests.helpers.methods import every_architecture
from tests.helpers.training import assemble_training, trainable_parameters

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VARIANTS = {
    "plain": Lora(r=4, lora_alpha=6),
    "dora": Lora(r=4, lora_alpha=6, use_dora=True),
    "rslora": Lora(r=4, lora_alpha=6, use_rslora=True),
    "every_matrix": Lora(r=4, lora_alpha=6, target_modules=r".*\.(c_attn|c_fc|c_proj|[qkvo]_proj|up_proj|down_proj)"),
}


def _config_of(model: nn.Module) -> Any:
    return model.peft_config["default"]  # type: ignore[index, union-attr]


@every_architecture
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_merged_model_has_equal_logits(
    variant: str,
    architecture: str,
    fresh_base: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
) -> None:
    """A trained update is merged into the matrices of the base; a transposed update would change the logits."""
    torch.manual_seed(3)
    model = VARIANTS[variant].apply(fresh_base(architecture), tokenizer)
    trainer = assemble_training(accelerator, model, torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-2))
    for _ in range(5):
        train_step(accelerator, trainer, one_batch(micro_batch()), max_grad_norm=None)
    model.eval()
    with torch.no_grad():
        unmerged = logits(model, micro_batch())
        base = logits(fresh_base(architecture).eval(), micro_batch())
        merged = logits(model.merge_and_unload().eval(), micro_batch())  # type: ignore[operator]
    torch.testing.assert_close(merged, unmerged, rtol=1e-4, atol=1e-4)
    assert (merged - base).abs().max() > 0.1  # the update is large enough to affect the logits


@every_architecture
def test_conv1d_sets_fan_in_fan_out(
    architecture: str, fresh_base: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    """GPT-2's Conv1D stores its weight transposed, a Linear does not; peft emits no warning about the setting."""
    with warnings.catch_warnings(record=True) as warnings_emitted:
        warnings.simplefilter("always")
        model = Lora(r=4).apply(fresh_base(architecture), tokenizer)
    assert _config_of(model).fan_in_fan_out is (architecture == "gpt2_tied")
    assert not [warning for warning in warnings_emitted if "fan_in_fan_out" in str(warning.message)]


@every_architecture
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_initial_logits_equal_those_of_the_base(
    variant: str,
    architecture: str,
    fresh_base: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """The initial update is zero, so that all methods start with the same predictions."""
    model = VARIANTS[variant].apply(fresh_base(architecture), tokenizer).eval()
    with torch.no_grad():
        expected = logits(fresh_base(architecture).eval(), micro_batch())
        torch.testing.assert_close(logits(model, micro_batch()), expected, rtol=1e-5, atol=1e-5)


def test_scaling_of_the_update(
    fresh_base: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    """The update is scaled by alpha / r, and by alpha / sqrt(r) with rsLoRA."""
    for method, expected in ((Lora(r=16, lora_alpha=8), 0.5), (Lora(r=16, lora_alpha=8, use_rslora=True), 2.0)):
        model = method.apply(fresh_base("gpt2_tied"), tokenizer)
        scales = {m.scaling["default"] for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)}  # type: ignore[index, union-attr]
        assert scales == {expected}


def test_target_modules_select_by_suffix_or_expression(
    fresh_base: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    """A list selects modules by suffix, a regular expression must match the whole name, and null is peft's default."""
    methods = {
        "names": Lora(r=2, target_modules=("attn.c_proj",)),
        "expression": Lora(r=2, target_modules=r"transformer\.h\.1\..*c_fc"),
        "null": Lora(r=2, target_modules=None),
        "all": Lora(r=2, target_modules="all-linear"),
        "default": Lora(r=2),
    }
    adapted = {
        key: {
            name.split(".lora_")[0].removeprefix("base_model.model.transformer.")
            for name in trainable_parameters(model)
        }
        for key, method in methods.items()
        for model in [method.apply(fresh_base("gpt2_tied"), tokenizer)]
    }
    assert adapted == {
        "names": {"h.0.attn.c_proj", "h.1.attn.c_proj"},
        "expression": {"h.1.mlp.c_fc"},
        "null": {"h.0.attn.c_attn", "h.1.attn.c_attn"},
        "all": {
            f"h.{block}.{name}" for block in (0, 1) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        },
        "default": adapted["all"],
    }


def test_architecture_without_peft_default_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    """With target_modules=null, the error names the key to set; all-linear applies."""
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    base = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(UnsupportedModelError, match=r"set method\.target_modules=all-linear, or name modules"):
        Lora(target_modules=None).apply(base, tokenizer)
    assert trainable_parameters(Lora().apply(base, tokenizer))


@pytest.mark.parametrize(
    ("architecture", "target"),
    [
        ("gpt2_tied", ("wte",)),
        ("gpt2_tied", ("lm_head",)),
        ("gpt2_tied", "lm_head|transformer.wte"),
        ("llama_tied", ("q_proj", "embed_tokens")),
        ("llama_tied", ("model.embed_tokens",)),
    ],
)
def test_tied_matrix_is_refused(
    architecture: str, target: str | tuple[str, ...], fresh_base: Callable[[str], PreTrainedModel], tokenizer: Any
) -> None:
    """Merging an adapter of a matrix with two uses changes the model; the sentence names both."""
    base = fresh_base(architecture)
    with pytest.raises(TargetModulesError, match=r"(lm_head|wte|embed_tokens), which shares its matrix with "):
        Lora(target_modules=target).apply(base, tokenizer)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_merged_adapter_of_an_untied_matrix_equals_the_adapted_model(
    target: str, fresh_base: Callable[[str], PreTrainedModel], tokenizer: Any
) -> None:
    """Head and embedding of their own can be adapted and merged."""
    model: Any = Lora(r=2, target_modules=(target,)).apply(fresh_base("llama_untied"), tokenizer)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.arange(3, 12)[None]
    expected = model.eval()(input_ids=ids).logits
    assert torch.allclose(model.merge_and_unload()(input_ids=ids).logits, expected, atol=1e-4)
