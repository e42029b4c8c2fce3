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
    "resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout", "hidden_dropout", "dropout", "activation_dropout",
)  # fmt: skip


@dataclass(frozen=True)
class LoadedModel:
    """A loaded base, its tokenizer and what exactly was loaded."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    identity: str

    @property
    def positions(self) -> int | None:
        """How many positions the model has, None where its config does not say."""
        return get_max_positions(self.model.config)


def get_max_positions(config: PreTrainedConfig) -> int | None:
    """How many positions a model has, None where its config does not say."""
    return next((int(getattr(config, key)) for key in _POSITION_KEYS if getattr(config, key, None)), None)


def load_config(knobs: Model) -> PreTrainedConfig:
    """The base's config, with the recipe's dropout written in."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            _resolve_model_path(knobs), revision=knobs.revision, trust_remote_code=knobs.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise _translate_error(knobs, "config", error) from error
    if knobs.dropout is not None:
        found = [key for key in _DROPOUT_KEYS if hasattr(config, key)]
        if not found and knobs.dropout > 0:
            raise OutOfRangeError(
                f"{config.model_type} has no dropout to set to {knobs.dropout}; leave model.dropout null"
            )
        for key in found:
            setattr(config, key, knobs.dropout)
    return config  # type: ignore[no-any-return]


def load_tokenizer(knobs: Model) -> PreTrainedTokenizerBase:
    """The base's tokenizer."""
    from transformers import AutoTokenizer

    place = knobs.tokenizer or _resolve_model_path(knobs)
    try:
        return AutoTokenizer.from_pretrained(  # type: ignore[no-any-return]
            place, revision=None if knobs.tokenizer else knobs.revision, trust_remote_code=knobs.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise _translate_error(knobs, "tokenizer", error) from error


def load_model(knobs: Model, arithmetic: torch.dtype | None = None) -> LoadedModel:
    """Config, weights (in float32, or quantised) and tokenizer of the base.

    ``arithmetic`` is the type that quantised weights are computed with, float32 by default.

    Raises:
        ModelNotFoundError: nothing usable under that name; says what was tried.
        HubUnreachableError: the hub did not answer and the cache has no copy.
        UnsupportedModelError: the attention implementation asked for is not there, or it is no causal language model.
    """
    if knobs.revision is not None and Path(_resolve_model_path(knobs)).is_dir():
        raise OutOfRangeError(f"model.revision={knobs.revision!r} is of the hub, and {_resolve_model_path(knobs)} is a folder")
    config = load_config(knobs)
    tokenizer = load_tokenizer(knobs)
    model = _load_weights(knobs, config, arithmetic)
    if knobs.fused_gelu:
        fuse_gelu(model)
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.eos_token_id
    return LoadedModel(model, tokenizer, compute_model_fingerprint(model, knobs))


def fuse_gelu(model: PreTrainedModel) -> None:
    """Put torch's kernel in the place of the same function written out, which saves three tensors for each."""
    from transformers.activations import ACT2FN, NewGELUActivation

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, ACT2FN["gelu_pytorch_tanh"])


def _build_quantization_kwargs(knobs: Model, arithmetic: torch.dtype | None) -> dict[str, Any]:
    """What from_pretrained must be told to quantise."""
    if knobs.quantization is None:
        return {}
    if knobs.init == "random":
        raise OutOfRangeError("model.quantization is of loaded weights; leave model.init at pretrained")
    import torch
    from transformers import BitsAndBytesConfig

    if knobs.quantization == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=arithmetic or torch.float32,
        bnb_4bit_use_double_quant=knobs.quantization == "nf4_double",
    )  # fmt: skip
    return {"quantization_config": config}


def _build_common_kwargs(knobs: Model) -> dict[str, Any]:
    import torch

    return {
        "trust_remote_code": knobs.trust_remote_code,
        "attn_implementation": knobs.attention,
        "dtype": torch.float32,
    }


def build_from_config(knobs: Model, config: PreTrainedConfig) -> PreTrainedModel:
    """The architecture, with weights that torch initialises."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config, **_build_common_kwargs(knobs))  # type: ignore[no-any-return]


def _load_weights(knobs: Model, config: PreTrainedConfig, arithmetic: torch.dtype | None) -> PreTrainedModel:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    common = _build_common_kwargs(knobs)
    quantised = _build_quantization_kwargs(knobs, arithmetic)
    try:
        if knobs.init == "random":
            return build_from_config(knobs, config)
        loaded: tuple[PreTrainedModel, dict[str, Any]] = AutoModelForCausalLM.from_pretrained(  # type: ignore[assignment]
            _resolve_model_path(knobs), config=config, revision=knobs.revision, use_safetensors=True,
            output_loading_info=True, **quantised, **common,
        )  # fmt: skip
        model, report = loaded
        if missing := sorted(report["missing_keys"]):  # transformers would warn and make them up
            raise ValueError(f"{len(missing)} of its tensors are missing ({', '.join(missing[:3])})")
    except ImportError as error:
        raise UnsupportedModelError(f"model.attention={knobs.attention} is not there: {_get_first_line(error)}") from error
    except (OSError, ValueError, SafetensorError) as error:
        if "Unrecognized configuration class" in str(error):
            raise UnsupportedModelError(
                f"{config.model_type} is no causal language model; set model.path to one that is"
            ) from error
        raise _translate_error(knobs, "weights", error) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise _translate_error(knobs, "weights", ValueError("their shapes are not those of config.json")) from error
    return model


def compute_model_fingerprint(model: PreTrainedModel, knobs: Model) -> str:
    """What was loaded: the hub's commit, the hash of a folder's weights, or that the weights are random."""
    if knobs.init == "random":
        return "random weights"
    commit = getattr(model.config, "_commit_hash", None)
    if commit:
        return f"commit {commit}"
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(_resolve_model_path(knobs)).glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return f"blake2b {digest.hexdigest()}"


def _resolve_model_path(knobs: Model) -> str:
    return str(shipped.SHIPPED_MODEL_DIR) if knobs.path == shipped.SHIPPED_MODEL else knobs.path


def _translate_error(knobs: Model, what: str, error: Exception) -> ModelNotFoundError | HubUnreachableError:
    """One sentence for what transformers says in many: what was tried, and how to point to a local copy."""
    local = "set model.path to the folder of a local copy (config.json, model.safetensors and tokenizer files)"
    place = knobs.tokenizer if what == "tokenizer" and knobs.tokenizer else _resolve_model_path(knobs)
    if Path(place).is_dir():
        if what == "weights":
            hint = "put model.safetensors there, or set model.init=random for the architecture alone"
            return ModelNotFoundError(f"the folder {place} holds no usable weights: {_get_first_line(error)}", hint)
        return ModelNotFoundError(f"the folder {place} holds no usable {what}: {_get_first_line(error)}", local)
    text = str(error).lower()
    if "couldn't connect" in text or "offline" in text or "connection" in text:
        return HubUnreachableError(
            f"the hub did not answer for the {what} of {place!r}, "
            "and neither a folder of that name nor a cached copy is there",
            local,
        )
    return ModelNotFoundError(
        f"no {what} for {place!r} (tried a folder, the cache and the hub): {_get_first_line(error)}", local
    )


def _get_first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")[:200] if str(error).strip() else type(error).__name__
