"""Names of a run's base model: in a model card, in an adapter's config, and in the Python code that loads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peftbench import shipped
from peftbench.export.privacy import get_last_name
from peftbench.modeling.gguf_file import is_gguf_path, read_license
from peftbench.record import RECORD_FILE, RunRecord, read_record

if TYPE_CHECKING:
    from peftbench.modeling.run_base import RunBase

_LOAD = "AutoModelForCausalLM.from_pretrained"


@dataclass(frozen=True)
class BaseReference:
    """The base model of a run."""

    title: str
    """Name on the Hub, or the name of a folder or file."""
    hub_name: str | None
    """Name on the Hub; None for a local base model."""
    load_code: str
    """Python expression that loads it."""
    license: str | None
    """License, if it is known."""
    runs: tuple[str, ...] = ()
    """Names of the runs between the base model and this one, the latest first."""
    imports: tuple[str, ...] = ()
    """Import lines that ``load_code`` needs besides transformers."""

    @property
    def adapter_base(self) -> str:
        """Value of ``base_model_name_or_path`` in the config of an adapter."""
        return self.hub_name or self.title


def find_base(run: RunBase) -> BaseReference:
    """Return the base model of a run; of a run that started from a run, the first base model."""
    record, names = run.record, []
    while (folder := Path(_get_path(record))).is_dir() and (folder / RECORD_FILE).is_file():
        record = read_record(folder / RECORD_FILE)
        names.append(record.name)
    path = _get_path(record)
    runs = tuple(names)
    if path == shipped.SHIPPED_MODEL:
        license = _read_card_license(shipped.SHIPPED_MODEL_DIR)
        import_line = "from peftbench.shipped import SHIPPED_MODEL_DIR"
        return BaseReference(
            shipped.SHIPPED_MODEL_DIR.name, None, f"{_LOAD}(SHIPPED_MODEL_DIR)", license, runs, (import_line,)
        )
    if is_gguf_path(path):
        name = get_last_name(path)
        license = read_license(path) if Path(path).is_file() else None
        return BaseReference(name, None, f'{_LOAD}(".", gguf_file={name!r})', license, runs)
    if Path(path).exists() or not _is_hub_name(path):
        name = get_last_name(path)
        return BaseReference(name, None, f'{_LOAD}("{name}")', _read_card_license(Path(path)), runs)
    kind, _, commit = str(record.model_fingerprint).partition(" ")
    revision = f', revision="{commit}"' if kind == "commit" else ""
    return BaseReference(path, path, f'{_LOAD}("{path}"{revision})', None, runs)


def _get_path(record: RunRecord) -> str:
    return str(record.recipe.get("model", {}).get("path", ""))


def _is_hub_name(path: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return True


def _read_card_license(folder: Path) -> str | None:
    """Return the license in the model card of a folder, None without one."""
    from huggingface_hub import ModelCard

    try:
        license = ModelCard.load(folder / "README.md").data.get("license")
    except (OSError, ValueError):  # no card, or one that is not valid
        return None
    return license if isinstance(license, str) else None
