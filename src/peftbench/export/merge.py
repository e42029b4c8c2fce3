"""Write the trained model of a run as one whole model: an adapter is merged, and the result is checked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftbench.common.dtypes import TORCH_DTYPES
from peftbench.common.units import format_bytes
from peftbench.errors import DiskFullError, MergeError, ModelError, PeftbenchError
from peftbench.export.comparison import (
    ComparisonTexts,
    LogitComparison,
    check_merge,
    check_written,
    compute_logits,
    encode_texts,
    relative_error,
)
from peftbench.modeling.loading import load_config, resolve_model_path
from peftbench.modeling.saved_tokenizer import save_tokenizer
from peftbench.training.build import load_trained_base_model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from peftbench.modeling.loading import LoadedModel
    from peftbench.modeling.run_base import RunBase
    from peftbench.recipe.schema import Model, Precision, Recipe

_MAX_HEADER_BYTES = 100_000_000
_STORED_NAMES = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
"""Names of dtypes in safetensors files."""


def check_mergeable(run: RunBase, recipe: Recipe) -> None:
    """Check that the run saved a whole model, or an adapter that can be merged.

    Raises:
        MergeError: it did not.
    """
    if run.has_adapter and not run.merges_into_base:
        raise MergeError(
            f"{run.folder} is a run of {run.method}, whose trained part cannot be merged into the base model",
            "export it without --merge, and load it with peft",
        )


def resolve_dtype(run: RunBase, model_config: Model) -> Precision:
    """Return the type in which the base model's weights are stored; fp32 if it is unknown, or a GGUF file's.

    Raises:
        ModelError, HubUnreachableError: an adapter's base model was not found.
    """
    import torch

    try:
        dtype = load_config(model_config).dtype
    except PeftbenchError:
        if run.has_adapter:
            raise
        return "fp32"  # a saved whole model is complete without its base
    named = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    names: dict[object, str] = {value: name for name, value in TORCH_DTYPES.items()}
    stored = names.get(named) or _read_stored_dtype(Path(resolve_model_path(model_config)))
    return stored or "fp32"  # type: ignore[return-value]


def _read_stored_dtype(folder: Path) -> str | None:
    """Return the type of the largest tensor in a folder's first weight file, None without a readable one."""
    file = next(iter(sorted(folder.glob("*.safetensors"))), None) if folder.is_dir() else None
    if file is None:
        return None
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length) if length <= _MAX_HEADER_BYTES else b""
    try:
        entries = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
        largest = max(entries, key=lambda entry: entry["data_offsets"][1] - entry["data_offsets"][0])
        return _STORED_NAMES.get(str(largest["dtype"]))
    except (ValueError, KeyError, TypeError, IndexError):
        return None


def write_merged_model(run: RunBase, recipe: Recipe, dtype: Precision, folder: Path) -> LogitComparison:
    """Write the run's model with its tokenizer to ``folder`` in ``dtype``, and compare its logits with the run's.

    Quantized bases are dequantized first. The trained model is then the reference in float32; the written one is loaded
    again and computes in ``dtype``.

    Raises:
        MergeError: the logits differ by more than the tolerance.
        DiskFullError: the disk has no room for the weights.
        ModelError, HubUnreachableError: the base model cannot be loaded, or has changed.
    """
    # Any attention will do, and dropout is a setting of the training.
    settings = {"attention": "auto", "dropout": None}
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update=settings)})
    fingerprints = (str(run.record.model_fingerprint), run.record.model_config_fingerprint)
    base = load_trained_base_model(recipe, run.model_dir, *fingerprints)
    texts = encode_texts(recipe, base)
    model, reference, effect = _merge(run, recipe, base, texts)
    _check_disk_space(model, TORCH_DTYPES[dtype], folder)
    model.to(TORCH_DTYPES[dtype])  # type: ignore[arg-type]
    model.save_pretrained(folder)
    save_tokenizer(_load_saved_tokenizer(run, recipe), None, folder)
    written = _load_written(folder, recipe)
    _check_written_weights(written, model)
    del model, base
    error = relative_error(compute_logits(written, texts), reference)
    comparison = LogitComparison(dtype, error, effect, len(texts.ids), texts.missing_examples)
    check_written(comparison)
    return comparison


def _merge(
    run: RunBase, recipe: Recipe, base: LoadedModel, texts: ComparisonTexts
) -> tuple[PreTrainedModel, list[torch.Tensor], float | None]:
    """Return the merged model in float32, the trained model's logits, and what the adapter changes.

    Raises:
        MergeError: the merge changes the logits.
    """
    if not run.has_adapter:
        return base.model, compute_logits(base.model, texts), None
    plain = _dequantize(base.model)
    untrained = compute_logits(plain, texts)
    adapted: Any = recipe.method.apply(plain, base.tokenizer)
    recipe.method.load(adapted, run.model_dir)
    reference = compute_logits(adapted, texts)
    try:
        merged = recipe.method.merge(adapted)
    except (ValueError, NotImplementedError) as error:  # NaN in a weight, or a layer that peft cannot merge
        raise MergeError(
            f"peft cannot merge the adapter of {run.folder}: {error}", "export it without --merge"
        ) from error
    effect = relative_error(reference, untrained)
    check_merge(relative_error(compute_logits(merged, texts), reference), effect)
    return merged, reference, effect


def _dequantize(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with plain weights in float32."""
    if getattr(model, "is_quantized", False):
        model = model.dequantize()
    return model.float()  # type: ignore[no-any-return]


def _load_saved_tokenizer(run: RunBase, recipe: Recipe) -> Any:  # noqa: ANN401 — any class of tokenizer
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(run.model_dir, trust_remote_code=recipe.model.trust_remote_code)


def _load_written(folder: Path, recipe: Recipe) -> PreTrainedModel:
    """Load the written model as a user would, in the type of its config.

    Raises:
        ModelError: transformers does not load it.
    """
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(  # type: ignore[no-any-return]
            folder, dtype="auto", trust_remote_code=recipe.model.trust_remote_code
        )
    except Exception as error:  # any library of a model's own code
        raise ModelError(f"transformers cannot load the merged model: {error}", "export it without --merge") from error


def _check_written_weights(written: PreTrainedModel, merged: PreTrainedModel) -> None:
    """Check that the loaded weights are those that were written, to the last bit.

    Raises:
        MergeError: a weight differs, which the tolerance of a 16-bit type could hide.
    """
    expected = dict(merged.named_parameters())
    for name, parameter in written.named_parameters():
        if name not in expected or not parameter.float().equal(expected[name].float()):
            raise MergeError(
                f"transformers loads another {name} from the merged model than was written",
                "export it without --merge, and report this as a bug",
            )


def _check_disk_space(model: PreTrainedModel, dtype: torch.dtype, folder: Path) -> None:
    """Check that the disk has room for the weights.

    Raises:
        DiskFullError: it does not.
    """
    check_space(sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize, folder)


def check_space(needed: int, folder: Path) -> None:
    """Check that the disk of ``folder`` has ``needed`` bytes.

    Raises:
        DiskFullError: it has fewer.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DiskFullError(
            f"the exported model needs {format_bytes(needed)}, but the disk of {folder.parent} has "
            f"{format_bytes(free)} left",
            "free space, or give --output on another disk",
        )
