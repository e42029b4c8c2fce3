"""Load the base model: from the Hub, a folder, a run, a GGUF file, the shipped model, or random weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftbench import shipped
from peftbench.common.fingerprint import hash_file
from peftbench.common.text import first_line
from peftbench.errors import (
    HubUnreachableError,
    ModelNotFoundError,
    OutOfRangeError,
    PeftbenchError,
    UnsupportedModelError,
)
from peftbench.modeling.attention import register_sdpa_attention
from peftbench.modeling.attention_implementation import check_attention
from peftbench.modeling.causal_config import is_part_of_multimodal, select_causal_config
from peftbench.modeling.config_faults import build_config_error, config_faults, describe_fault, find_size_fault
from peftbench.modeling.dropout import find_remaining_dropout, set_dropout
from peftbench.modeling.generation import repair_generation_config
from peftbench.modeling.gguf_file import (
    build_gguf_arguments,
    check_gguf_file,
    compute_file_hash,
    describe_conversion,
    is_gguf_path,
    remove_gguf_marks,
    split_gguf_path,
)
from peftbench.modeling.load_checks import (
    check_all_used,
    check_finite,
    check_tokenizer,
    check_vocabulary,
    count_tokens,
    repair_tied_config,
    select_text_weights,
)
from peftbench.modeling.model_folder import (
    check_model_folder,
    check_tokenizer_folder,
    find_tokenizer_fault,
    read_config_file,
)
from peftbench.modeling.quantization import (
    build_quantization_config,
    convert_unquantized_weights,
    disable_cpu_repacking,
)
from peftbench.modeling.run_base import RunBase, find_run_base, merge_adapter, name_by_run
from peftbench.modeling.weight_files import check_weight_files

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from peftbench.recipe.schema import Model

_GGUF_HINT = "download it again, or set model.path to a copy of the model in safetensors"
_POSITION_KEYS = ("max_position_embeddings", "n_positions")
_NEUTRAL_CONFIG_KEYS = {"_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache"}
"""Keys of config.json that change no number of a run: it has dtypes and caching of its own."""


@dataclass(frozen=True)
class LoadedModel:
    """A loaded base model, its tokenizer and a fingerprint of its weights."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    config_fingerprint: str | None = None
    """Hash of the config.json of a local folder; None for a model of the Hub, whose commit is its fingerprint."""
    notes: tuple[str, ...] = ()
    """Notes for the record."""

    @property
    def max_positions(self) -> int | None:
        """Number of positions of the model, None if its config has no limit."""
        return get_max_positions(self.model.config)


def get_max_positions(config: PreTrainedConfig) -> int | None:
    """Return the number of positions of a model, None if its config has no limit."""
    return next((int(getattr(config, key)) for key in _POSITION_KEYS if getattr(config, key, None)), None)


def load_config(model_config: Model) -> PreTrainedConfig:
    """Load the base model's config and set the recipe's dropout in it.

    Raises:
        ModelNotFoundError, HubUnreachableError: as :func:`load_model`.
        UnsupportedModelError: the model is not a causal language model, or contains one that transformers cannot load
            on its own.
    """
    if (run := find_run_base(model_config)) is not None:
        return load_config(run.select_weights(model_config))
    path = resolve_model_path(model_config)
    if is_gguf_path(path):
        check_gguf_file(model_config, path)
    else:
        check_model_folder(path)
    config = _read_config(model_config, path)
    if fault := find_size_fault(config):
        raise build_config_error(path, fault)
    if model_config.init == "random" or getattr(config, "quantization_config", None) is None:
        vars(config).pop("quantization_config", None)  # of weights that are not loaded, or null
    if model_config.dropout is not None:
        set_dropout(config, model_config.dropout)
    return config  # type: ignore[no-any-return]


def _read_config(model_config: Model, path: str) -> PreTrainedConfig:
    from transformers import AutoConfig

    location, gguf = split_gguf_path(path)
    try:
        config = AutoConfig.from_pretrained(
            location, revision=model_config.revision, trust_remote_code=model_config.trust_remote_code, **gguf
        )
        vars(config).pop("_model_name_or_path", None)  # a title in the metadata of a GGUF file
        return select_causal_config(config)
    except PeftbenchError:
        raise
    except Exception as error:  # any value of the file may be wrong, in any architecture
        is_hub_error = isinstance(error, (OSError, ValueError)) or _is_connection_error(error)
        if gguf or (not Path(path).is_dir() and is_hub_error):
            raise _translate_error(model_config, "config", error) from error
        raise build_config_error(path, describe_fault(error, read_config_file(path))) from error


def load_tokenizer(model_config: Model) -> PreTrainedTokenizerBase:
    """Load the base model's tokenizer.

    Raises:
        ModelNotFoundError: no usable tokenizer at that path.
        HubUnreachableError: the Hub did not answer and the cache has no copy.
    """
    from transformers import AutoTokenizer

    if (run := find_run_base(model_config)) is not None:
        return load_tokenizer(run.select_weights(model_config))
    path = model_config.tokenizer or resolve_model_path(model_config)
    location, gguf = (path, {}) if model_config.tokenizer else split_gguf_path(path)
    if not gguf:
        check_tokenizer_folder(path)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            location,
            revision=None if model_config.tokenizer else model_config.revision,
            trust_remote_code=model_config.trust_remote_code,
            **gguf,
        )
    except Exception as error:  # tokenizers raises Exception itself; any part of the files may be wrong
        if fault := find_tokenizer_fault(path):
            raise ModelNotFoundError(*fault) from error
        raise _translate_error(model_config, "tokenizer", error) from error
    check_tokenizer(tokenizer, path)
    return tokenizer


def load_model(
    model_config: Model, compute_dtype: torch.dtype | None = None, weight_dtype: torch.dtype | None = None
) -> LoadedModel:
    """Load config, weights and tokenizer of the base model.

    ``compute_dtype`` is the dtype of matmuls with 4-bit weights, and ``weight_dtype`` that of unquantized weights, both
    float32 by default. Random weights are drawn in float32, so that they are the same numbers for every method.

    Raises:
        ModelNotFoundError: no usable model at that path; the message lists what was tried.
        HubUnreachableError: the Hub did not answer and the cache has no copy.
        UnsupportedModelError: the attention implementation is not installed, or the model is not a causal LM.
        MergeError: the path is a run whose adapter cannot be merged in memory.
    """
    if (run := find_run_base(model_config)) is not None:
        return _add_training(load_model(run.select_weights(model_config), compute_dtype), run)
    if model_config.revision is not None and Path(resolve_model_path(model_config)).is_dir():
        raise OutOfRangeError(
            f"model.revision={model_config.revision!r} applies to Hub models, but {resolve_model_path(model_config)} "
            "is a local folder; set model.revision=null"
        )
    config = load_config(model_config)
    check_attention(model_config, config, resolve_model_path(model_config))
    tokenizer = load_tokenizer(model_config)
    model = load_base_weights(model_config, config, compute_dtype, weight_dtype)
    check_vocabulary(count_tokens(tokenizer), model, resolve_model_path(model_config))
    check_finite(model, resolve_model_path(model_config))
    register_sdpa_attention()
    if model_config.fused_gelu:
        fuse_gelu(model)
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.eos_token_id
    notes = [
        repair_tied_config(model),
        find_remaining_dropout(model, model_config.dropout),
        repair_generation_config(model),
    ]
    if is_gguf_path(resolve_model_path(model_config)) and model_config.init == "pretrained":
        notes.append(describe_conversion(resolve_model_path(model_config)))
    return LoadedModel(
        model,
        tokenizer,
        compute_model_fingerprint(model.config, model_config),
        compute_config_fingerprint(model_config),
        tuple(note for note in notes if note is not None),
    )


def _add_training(base: LoadedModel, run: RunBase) -> LoadedModel:
    """Return the trained model of ``run``, whose weights or whose adapter's base were loaded as ``base``.

    Raises:
        ModelError: the adapter's base has changed since the run.
    """
    loaded = base
    if run.has_adapter:
        run.check_base(base.fingerprint, base.config_fingerprint)
        fingerprint = run.extend_fingerprint(base.fingerprint)
        loaded = replace(base, model=merge_adapter(base.model, run), fingerprint=fingerprint)
        name_by_run(loaded.model, run)
    return replace(loaded, notes=(*base.notes, run.describe()))


def fuse_gelu(model: PreTrainedModel) -> None:
    """Replace GELU written as separate operations by torch's kernel, which keeps three fewer activations per layer."""
    from transformers.activations import ACT2FN, NewGELUActivation

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, ACT2FN["gelu_pytorch_tanh"])


def _build_common_kwargs(model_config: Model) -> dict[str, Any]:
    import torch

    return {
        "trust_remote_code": model_config.trust_remote_code,
        "attn_implementation": None if model_config.attention == "auto" else model_config.attention,
        "dtype": torch.float32,
    }


def build_from_config(model_config: Model, config: PreTrainedConfig) -> PreTrainedModel:
    """Build the architecture with randomly initialized weights."""
    from transformers import AutoModelForCausalLM

    path = resolve_model_path(model_config)
    check_attention(model_config, config, path)
    with config_faults(path, config, trust_remote_code=model_config.trust_remote_code):
        return AutoModelForCausalLM.from_config(config, **_build_common_kwargs(model_config))  # type: ignore[no-any-return]


def load_base_weights(
    model_config: Model,
    config: PreTrainedConfig,
    compute_dtype: torch.dtype | None,
    weight_dtype: torch.dtype | None,
) -> PreTrainedModel:
    """Load the base model with this config, without its tokenizer; the arguments are those of :func:`load_model`.

    Raises:
        ModelError: as :func:`load_model`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from peftbench.modeling.frozen_weights import load_weights_in

    weight_dtype = weight_dtype or torch.float32
    common = _build_common_kwargs(model_config)
    is_stored_quantized = hasattr(config, "quantization_config")
    quantization = build_quantization_config(model_config, config, compute_dtype or torch.float32)
    path = resolve_model_path(model_config)
    location, gguf = _get_weights_location(path)
    with _translated_errors(model_config, is_quantized=quantization is not None):
        if model_config.init == "random":
            return build_from_config(model_config, config)
        check_weight_files(path)
        if quantization is not None and is_stored_quantized:  # transformers prefers the config's to the argument
            config.quantization_config = quantization.to_dict()
        with (
            config_faults(path, config, trust_remote_code=model_config.trust_remote_code),
            load_weights_in(torch.float32 if is_stored_quantized else weight_dtype),
        ):
            loaded: tuple[PreTrainedModel, dict[str, Any]] = AutoModelForCausalLM.from_pretrained(  # type: ignore[assignment]
                location,
                config=config,
                revision=model_config.revision,
                use_safetensors=True,
                output_loading_info=True,
                **{"quantization_config": None if is_stored_quantized else quantization} | gguf,
                **common,
            )
        model, report = loaded
        if gguf:
            remove_gguf_marks(model, path)
        if is_stored_quantized:
            convert_unquantized_weights(model, weight_dtype)
        if is_stored_quantized or quantization is not None:
            disable_cpu_repacking(model)
        if missing := sorted(report["missing_keys"]):  # transformers only warns and initializes them randomly
            raise ValueError(f"{len(missing)} tensors are missing ({', '.join(missing[:3])})")
        unexpected = report["unexpected_keys"]
        if is_part_of_multimodal(config):  # the other parts are not loaded
            unexpected = select_text_weights(unexpected, model)
        check_all_used(unexpected, path)
    return model


@contextmanager
def _translated_errors(model_config: Model, *, is_quantized: bool) -> Iterator[None]:
    """Raise what loading weights raises as errors of this package."""
    from safetensors import SafetensorError

    try:
        yield
    except ImportError as error:
        if is_quantized:
            raise UnsupportedModelError(
                f"weights in {model_config.quantization} need bitsandbytes, which cannot be used: {_shorten(error)}"
            ) from error
        raise UnsupportedModelError(
            f"model.attention={model_config.attention} is not installed: {_shorten(error)}"
        ) from error
    except (OSError, ValueError, SafetensorError) as error:
        raise _translate_error(model_config, "weights", error) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise _translate_error(model_config, "weights", ValueError("their shapes do not match config.json")) from error


def _get_weights_location(path: str) -> tuple[str, dict[str, Any]]:
    """Return where transformers loads weights from, and the arguments that a GGUF file needs, empty for others."""
    location, gguf = split_gguf_path(path)
    return location, gguf | build_gguf_arguments() if gguf else {}


def read_base_fingerprint(model_config: Model) -> str:
    """Return the fingerprint that the loaded base model would have, without loading its weights.

    Raises:
        PeftbenchError: as in :func:`load_config`.
    """
    return compute_model_fingerprint(load_config(model_config), model_config)


def compute_model_fingerprint(config: PreTrainedConfig, model_config: Model) -> str:
    """Return what is loaded: the Hub commit, the hash of a folder's weights, or "random weights"."""
    if model_config.init == "random":
        return "random weights"
    if (run := find_run_base(model_config)) is not None:
        fingerprint = compute_model_fingerprint(config, run.select_weights(model_config))
        return run.extend_fingerprint(fingerprint) if run.has_adapter else fingerprint
    if is_gguf_path(resolve_model_path(model_config)):
        return f"blake2b {compute_file_hash(Path(resolve_model_path(model_config)))}"
    commit = getattr(config, "_commit_hash", None)
    if commit:
        return f"commit {commit}"
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(resolve_model_path(model_config)).glob("*.safetensors")):
        hash_file(digest, path)
    return f"blake2b {digest.hexdigest()}"


def compute_config_fingerprint(model_config: Model) -> str | None:
    """Return the hash of the values in a local folder's config.json that can change a number; None without one."""
    if (run := find_run_base(model_config)) is not None:
        return compute_config_fingerprint(run.select_weights(model_config))
    content = read_config_file(resolve_model_path(model_config))
    if not content:
        return None
    text = json.dumps(_drop_neutral_config_keys(content), sort_keys=True)
    return f"blake2b {hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"


def _drop_neutral_config_keys(content: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _drop_neutral_config_keys(value) if isinstance(value, dict) else value
        for key, value in content.items()
        if key not in _NEUTRAL_CONFIG_KEYS
    }


def resolve_model_path(model_config: Model) -> str:
    """Return the folder or Hub name of the model."""
    return str(shipped.SHIPPED_MODEL_DIR) if model_config.path == shipped.SHIPPED_MODEL else model_config.path


def _translate_error(model_config: Model, component: str, error: Exception) -> ModelNotFoundError | HubUnreachableError:
    """Return a one-sentence error: what was tried, and how to use a local copy."""
    local = "set model.path to the folder of a local copy (config.json, model.safetensors and tokenizer files)"
    path = (
        model_config.tokenizer
        if component == "tokenizer" and model_config.tokenizer
        else resolve_model_path(model_config)
    )
    if is_gguf_path(path):
        return ModelNotFoundError(f"the GGUF file {path} has no usable {component}: {_shorten(error)}", _GGUF_HINT)
    if Path(path).is_dir():
        if component == "weights":
            hint = "put model.safetensors there, or set model.init=random for random weights"
            return ModelNotFoundError(f"the folder {path} has no usable weights: {_shorten(error)}", hint)
        return ModelNotFoundError(f"the folder {path} has no usable {component}: {_shorten(error)}", local)
    if path.startswith(("/", "~", ".")) or path.count("/") > 1:  # not the name of a model on the Hub
        return ModelNotFoundError(f"folder {path!r} does not exist", local)
    if _is_connection_error(error):
        return HubUnreachableError(
            f"the Hub did not answer for the {component} of {path!r}, and no folder or cached copy of that name exists",
            local,
        )
    return ModelNotFoundError(
        f"no {component} for {path!r} (tried a folder, the cache and the Hub): {_shorten(error)}", local
    )


def _is_connection_error(error: Exception) -> bool:
    text = str(error).lower()
    return "couldn't connect" in text or "offline" in text or "connection" in text


def _shorten(error: Exception) -> str:
    return first_line(error, max_length=200).rstrip(".")
