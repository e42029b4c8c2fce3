"""Selection of the causal language model in a config: encoders are refused, a text model is selected."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig, PreTrainedConfig

from peftbench.errors import UnsupportedModelError
from peftbench.modeling.causal_config import select_causal_config
from tests.helpers.architectures import PLAIN, TINY_CONFIGS


def build_config(model_type: str, **values: Any) -> PreTrainedConfig:
    """Return a config with transformers' defaults for all other values."""
    config: PreTrainedConfig = AutoConfig.for_model(model_type, **values)
    return config


@pytest.mark.parametrize("model_type", ["bart", "mbart", "t5", "whisper", "marian", "pegasus"])
def test_encoder_decoder_is_refused(model_type: str) -> None:
    """Also where transformers would load the decoder by itself."""
    with pytest.raises(UnsupportedModelError, match=f"^{model_type} has an encoder and a decoder"):
        select_causal_config(build_config(model_type))


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "xlm", "modernbert"])
def test_encoder_is_refused(model_type: str) -> None:
    """Encoders are refused even if transformers has a causal head for them."""
    with pytest.raises(UnsupportedModelError, match=f"^{model_type} attends to later tokens"):
        select_causal_config(build_config(model_type))


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gpt_neox", "bert-generation", "mpt", "trocr"])
def test_causal_config_is_unchanged(model_type: str) -> None:
    """GPT-NeoX has is_decoder=False and is causal; an encoder with is_decoder=True is causal, too."""
    values = {"is_decoder": True} if model_type == "bert-generation" else {}
    config = build_config(model_type, **values)
    assert select_causal_config(config) is config


def test_causal_configs_of_the_sweep_are_accepted() -> None:
    """Only encoder-decoders are refused."""
    refused = set()
    for case, values in TINY_CONFIGS.items():
        try:
            select_causal_config(build_config(case.split(",")[0], **values))
        except UnsupportedModelError:
            refused.add(case)
    assert refused == {
        "bart",
        "blenderbot",
        "blenderbot-small",
        "marian",
        "mbart",
        "mvp",
        "pegasus",
        "plbart",
        "whisper",
    }


@pytest.mark.parametrize("model_type", ["qwen3_5", "llama4"])
def test_text_model_is_selected(model_type: str) -> None:
    """Transformers loads the text model of these folders by itself."""
    config = build_config(model_type, text_config=PLAIN | {"head_dim": 8})
    assert select_causal_config(config) is config.text_config
    assert select_causal_config(config).vocab_size == PLAIN["vocab_size"]


@pytest.mark.parametrize("model_type", ["gemma3", "fuyu", "gemma3n", "mllama"])
def test_multimodal_model_without_a_separate_text_model_is_refused(model_type: str) -> None:
    """The reason names text_config."""
    with pytest.raises(UnsupportedModelError, match=rf"^{model_type} is multimodal, .*\(text_config in "):
        select_causal_config(build_config(model_type))


def test_custom_code_and_other_parts_are_accepted() -> None:
    """Custom code may load its text model; a part that is not called text_config means nothing."""
    custom = build_config("gemma3", auto_map={"AutoModelForCausalLM": "own.Own"})
    other = build_config("llama", decoder={"hidden_size": 8})
    causal = build_config("xlm", causal=True)
    assert [select_causal_config(config) for config in (custom, other, causal)] == [custom, other, causal]


def test_text_model_of_a_quantized_folder_is_quantized() -> None:
    """Transformers reads quantization_config from the config of the model that it loads."""
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config = build_config("llama4", text_config=PLAIN | {"head_dim": 8}, quantization_config=quantization)
    assert select_causal_config(config).quantization_config == quantization
