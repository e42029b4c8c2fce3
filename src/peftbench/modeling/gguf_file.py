"""GGUF files as base models: llama.cpp's format, one file with config, tokenizer and quantized weights.

transformers reads them with the package gguf. The weights are dequantized, so that every method can train on them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftbench.errors import ModelError, ModelNotFoundError, OutOfRangeError
from peftbench.modeling.model_folder import find_pointer_fault

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftbench.recipe.schema import Model

_SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_UNQUANTIZED = frozenset({"F64", "F32", "F16", "BF16"})
INSTALL_HINT = "install it with pip install 'peftbench[gguf]', or give a copy of the model in safetensors"


def is_gguf_path(path: str) -> bool:
    """True if ``path`` names a GGUF file, which may be missing."""
    return path.lower().endswith(_SUFFIX) and not Path(path).is_dir()


def split_gguf_path(path: str) -> tuple[str, dict[str, str]]:
    """Return the first argument and the keyword arguments with which transformers loads from ``path``."""
    if not is_gguf_path(path):
        return path, {}
    return str(Path(path).parent), {"gguf_file": Path(path).name}


def check_gguf_file(model_config: Model, path: str) -> None:
    """Check that ``path`` is a GGUF file that can be read, and that the recipe has no key that excludes it.

    Raises:
        ModelNotFoundError: it is missing, or not a GGUF file.
        ModelError: the package gguf is missing.
        OutOfRangeError: ``model.quantization`` or ``model.revision`` is set.
    """
    from transformers.utils.import_utils import is_gguf_available

    try:
        if fault := find_pointer_fault(Path(path)):
            raise ModelNotFoundError(*fault)
        with Path(path).open("rb") as file:
            start = file.read(len(_MAGIC))
    except OSError as error:
        raise ModelNotFoundError(
            f"{path} cannot be read: {error.strerror}", "set model.path to a GGUF file, a folder or a name on the Hub"
        ) from error
    if start != _MAGIC:
        raise ModelNotFoundError(f"{path} is not a GGUF file: it starts with {start!r}", "download it again")
    if not is_gguf_available():
        raise ModelError(f"model.path={path} is a GGUF file, and the package gguf is not installed", INSTALL_HINT)
    if model_config.revision is not None:
        raise OutOfRangeError(
            f"model.revision={model_config.revision!r} applies to Hub models, but {path} is a local file; set "
            "model.revision=null"
        )
    if model_config.quantization is not None:
        raise OutOfRangeError(
            f"model.quantization={model_config.quantization} needs weights in safetensors, and {path} is a GGUF file; "
            "set model.quantization=null, which dequantizes it, or give a copy in safetensors"
        )


def describe_conversion(path: str) -> str:
    """Return a note for the record: the types of the file's matrices, which are dequantized, and its name."""
    from gguf import GGUFReader

    sizes: Counter[str] = Counter()
    for tensor in GGUFReader(path).tensors:
        if len(tensor.shape) > 1:
            sizes[tensor.tensor_type.name] += int(tensor.n_bytes)
    types = [name for name, _ in sizes.most_common()]
    verb = "converted" if _UNQUANTIZED.issuperset(types) else "dequantized"
    return f"the base model was {verb} from {' and '.join(types)} (GGUF file {Path(path).name})"


def read_license(path: str) -> str | None:
    """Return the license in the file's metadata, None without one."""
    from gguf import GGUFReader

    field = GGUFReader(path).fields.get("general.license")
    return None if field is None else str(field.contents())


def build_gguf_arguments() -> dict[str, Any]:
    """Return the arguments with which transformers dequantizes the weights, also where it has a kernel for them."""
    from transformers import GgufConfig

    return {"quantization_config": GgufConfig(dequantize=True)}


def remove_gguf_marks(model: PreTrainedModel, path: str) -> None:
    """Make transformers and peft treat the dequantized model as any other, e.g. save it, and name it by its file."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    model.name_or_path = path
    model.config.name_or_path = path


def compute_file_hash(path: Path) -> str:
    """Return the hash of a file's content."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
