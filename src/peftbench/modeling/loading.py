"""The base every method starts from: of the hub, a local folder, the shipped one, or an architecture alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftbench import shipped
from peftbench.errors import HubUnreachableError, ModelNotFoundError, OutOfRangeError, UnsupportedModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from peftbench.recipe.schema import Model

_POSITION_KEYS = ("max_position_embeddings", "n_positions")
_DROPOUT_KEYS = (
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "attention_dropout",
    "hidden_dropout",
    "dropout",
    "activation_dropout",
)


@dataclass(frozen=True)
class LoadedModel:
    """A loaded base, its tokenizer and what exactly was loaded."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str

    @property
    def max_positions(self) -> int | None:
        """How many positions the model has, None where its config does not say."""
        return get_max_positions(self.model.config)


def get_max_positions(config: PreTrainedConfig) -> int | None:
    """How many positions a model has, None where its config does not say."""
    return next((int(getattr(config, key)) for key in _POSITION_KEYS if getattr(config, key, None)), None)


def load_config(model_config: Model) -> PreTrainedConfig:
    """The base's config, with the recipe's dropout written in."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            _resolve_model_path(model_config),
            revision=model_config.revision,
            trust_remote_code=model_config.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise _translate_error(model_config, "config", error) from error
    if model_config.dropout is not None:
        found = [key for key in _DROPOUT_KEYS if hasattr(config, key)]
        if not found and model_config.dropout > 0:
            raise OutOfRangeError(
                f"{config.model_type} has no dropout to set to {model_config.dropout}; leave model.dropout null"
            )
        for key in found:
            setattr(config, key, model_config.dropout)
    return config  # type: ignore[no-any-return]


def load_tokenizer(model_config: Model) -> PreTrainedTokenizerBase:
    """The base's tokenizer."""
    from transformers import AutoTokenizer

    place = model_config.tokenizer or _resolve_model_path(model_config)
    try:
        return AutoTokenizer.from_pretrained(  # type: ignore[no-any-return]
            place,
            revision=None if model_config.tokenizer else model_config.revision,
            trust_remote_code=model_config.trust_remote_code,
        )
    except (OSError, ValueError, KeyError) as error:
        raise _translate_error(model_config, "tokenizer", error) from error


def load_model(model_config: Model, compute_dtype: torch.dtype | None = None) -> LoadedModel:
    """Config, weights (in float32, or quantised) and tokenizer of the base.

    ``arithmetic`` is the type that quantised weights are computed with, float32 by default.

    Raises:
        ModelNotFoundError: nothing usable under that name; says what was tried.
        HubUnreachableError: the hub did not answer and the cache has no copy.
        UnsupportedModelError: the attention implementation asked for is not there, or it is no causal language model.
    """
    if model_config.revision is not None and Path(_resolve_model_path(model_config)).is_dir():
        raise OutOfRangeError(
            f"model.revision={model_config.revision!r} is of the hub, and {_resolve_model_path(model_config)} is a folder"
        )
    config = load_config(model_config)
    tokenizer = load_tokenizer(model_config)
    model = _load_weights(model_config, config, compute_dtype)
    if model_config.fused_gelu:
        fuse_gelu(model)
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.eos_token_id
    return LoadedModel(model, tokenizer, compute_model_fingerprint(model, model_config))


def fuse_gelu(model: PreTrainedModel) -> None:
    """Put torch's kernel in the place of the same function written out, which saves three tensors for each."""
    from transformers.activations import ACT2FN, NewGELUActivation

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, ACT2FN["gelu_pytorch_tanh"])


def _build_quantization_kwargs(model_config: Model, compute_dtype: torch.dtype | None) -> dict[str, Any]:
    """What from_pretrained must be told to quantise."""
    if model_config.quantization is None:
        return {}
    if model_config.init == "random":
        raise OutOfRangeError("model.quantization is of loaded weights; leave model.init at pretrained")
    import torch
    from transformers import BitsAndBytesConfig

    if model_config.quantization == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute_dtype or torch.float32,
        bnb_4bit_use_double_quant=model_config.quantization == "nf4_double",
    )
    return {"quantization_config": config}


def _build_common_kwargs(model_config: Model) -> dict[str, Any]:
    import torch

    return {
        "trust_remote_code": model_config.trust_remote_code,
        "attn_implementation": model_config.attention,
        "dtype": torch.float32,
    }


def build_from_config(model_config: Model, config: PreTrainedConfig) -> PreTrainedModel:
    """The architecture, with weights that torch initialises."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config, **_build_common_kwargs(model_config))  # type: ignore[no-any-return]


def _load_weights(model_config: Model, config: PreTrainedConfig, compute_dtype: torch.dtype | None) -> PreTrainedModel:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    common = _build_common_kwargs(model_config)
    quantised = _build_quantization_kwargs(model_config, compute_dtype)
    try:
        if model_config.init == "random":
            return build_from_config(model_config, config)
        loaded: tuple[PreTrainedModel, dict[str, Any]] = AutoModelForCausalLM.from_pretrained(  # type: ignore[assignment]
            _resolve_model_path(model_config),
            config=config,
            revision=model_config.revision,
            use_safetensors=True,
            output_loading_info=True,
            **quantised,
            **common,
        )
        model, report = loaded
        if missing := sorted(report["missing_keys"]):  # transformers would warn and make them up
            raise ValueError(f"{len(missing)} of its tensors are missing ({', '.join(missing[:3])})")
    except ImportError as error:
        raise UnsupportedModelError(
            f"model.attention={model_config.attention} is not there: {_get_first_line(error)}"
        ) from error
    except (OSError, ValueError, SafetensorError) as error:
        if "Unrecognized configuration class" in str(error):
            raise UnsupportedModelError(
                f"{config.model_type} is no causal language model; set model.path to one that is"
            ) from error
        raise _translate_error(model_config, "weights", error) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise _translate_error(
            model_config, "weights", ValueError("their shapes are not those of config.json")
        ) from error
    return model


def compute_model_fingerprint(model: PreTrainedModel, model_config: Model) -> str:
    """What was loaded: the hub's commit, the hash of a folder's weights, or that the weights are random."""
    if model_config.init == "random":
        return "random weights"
    commit = getattr(model.config, "_commit_hash", None)
    if commit:
        return f"commit {commit}"
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(_resolve_model_path(model_config)).glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return f"blake2b {digest.hexdigest()}"


def _resolve_model_path(model_config: Model) -> str:
    return str(shipped.SHIPPED_MODEL_DIR) if model_config.path == shipped.SHIPPED_MODEL else model_config.path


def _translate_error(model_config: Model, component: str, error: Exception) -> ModelNotFoundError | HubUnreachableError:
    """One sentence for what transformers says in many: what was tried, and how to point to a local copy."""
    local = "set model.path to the folder of a local copy (config.json, model.safetensors and tokenizer files)"
    place = (
        model_config.tokenizer
        if component == "tokenizer" and model_config.tokenizer
        else _resolve_model_path(model_config)
    )
    if Path(place).is_dir():
        if component == "weights":
            hint = "put model.safetensors there, or set model.init=random for the architecture alone"
            return ModelNotFoundError(f"the folder {place} holds no usable weights: {_get_first_line(error)}", hint)
        return ModelNotFoundError(f"the folder {place} holds no usable {component}: {_get_first_line(error)}", local)
    text = str(error).lower()
    if "couldn't connect" in text or "offline" in text or "connection" in text:
        return HubUnreachableError(
            f"the hub did not answer for the {component} of {place!r}, "
            "and neither a folder of that name nor a cached copy is there",
            local,
        )
    return ModelNotFoundError(
        f"no {component} for {place!r} (tried a folder, the cache and the hub): {_get_first_line(error)}", local
    )


def _get_first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")[:200] if str(error).strip() else type(error).__name__
