"""The folder of a finished run as ``model.path``: its trained model is the base of the next training.

A saved whole model is loaded from the run's folder. A saved adapter is merged, in memory, into the base that it was
trained on. That base may be a run too, so trainings can be stacked.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from peftbench.common.fingerprint import may_be_equal
from peftbench.errors import MergeError, ModelError, ModelNotFoundError, OutOfRangeError, RecordError
from peftbench.methods import METHOD_KINDS
from peftbench.modeling.gguf_file import compute_file_hash
from peftbench.modeling.model_folder import ADAPTER_CONFIG_FILE
from peftbench.recipe.schema import Model
from peftbench.record import RECORD_FILE, RunRecord, read_record
from peftbench.run_dir.layout import RunDir
from peftbench.run_dir.saved_model import has_model_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftbench.methods.base import Method

_MERGED_COPY = "write a whole model with peftbench export {run} --merge, and set model.path to that folder"


@dataclass(frozen=True)
class RunBase:
    """A finished run whose trained model is a base model."""

    folder: Path
    record: RunRecord

    @property
    def model_dir(self) -> Path:
        """The folder of the saved model or adapter."""
        return RunDir(self.folder).model_dir

    @property
    def has_adapter(self) -> bool:
        """True if the run saved an adapter, not a whole model."""
        return (self.model_dir / ADAPTER_CONFIG_FILE).exists()

    @property
    def method(self) -> str:
        """Kind of the run's method."""
        return str(self.record.recipe["method"]["kind"])

    @property
    def merges_into_base(self) -> bool:
        """True if the run's adapter can be merged into its base, as its record states or its method implies."""
        saved = self.record.saved_model
        if saved is not None and saved.merges_into_base is not None:
            return saved.merges_into_base
        return self.build_method().merges_into_base

    def build_method(self) -> Method:
        """Return the run's method.

        Raises:
            RecordError: the record does not describe one that this version knows.
        """
        values = self.record.recipe["method"]
        try:
            return METHOD_KINDS[self.method].select_section(values).model_validate(values)
        except ValueError as error:
            raise RecordError(f"the method of the run {self.folder} is invalid", "train it again") from error

    def select_weights(self, model_config: Model) -> Model:
        """Return ``model_config`` with the place of the weights: the whole model, or the adapter's base.

        Raises:
            RecordError: the run's record does not describe its base.
        """
        keys: dict[str, object] = {"tokenizer": model_config.tokenizer or str(self.model_dir), "revision": None}
        if not self.has_adapter:
            return model_config.model_copy(update=keys | {"path": str(self.model_dir)})
        base = self._read_base()
        return model_config.model_copy(update=keys | {"path": base.path, "revision": base.revision})

    def _read_base(self) -> Model:
        try:
            return Model.model_validate(self.record.recipe.get("model"))
        except ValidationError as error:
            raise RecordError(
                f"{RunDir(self.folder).record_file} does not name the base model of its adapter", "train again"
            ) from error

    def check(self, model_config: Model) -> None:
        """Check that the run's model can be loaded as a base.

        Raises:
            OutOfRangeError: a key of ``model_config`` excludes it.
            MergeError: its adapter cannot be merged in memory.
        """
        if model_config.revision is not None or model_config.init == "random":
            key = "model.init=random" if model_config.init == "random" else f"model.revision={model_config.revision!r}"
            raise OutOfRangeError(
                f"{key} has no meaning for model.path={self.folder}, which is the folder of a run; remove it"
            )
        if not self.has_adapter:
            return
        if not self.merges_into_base:
            base = self.record.recipe.get("model", {}).get("path")
            raise MergeError(
                f"{self.folder} is a run of {self.method}, whose trained part cannot be merged into its base",
                f"set model.path={base}, the base model of that run, or give a run of another method",
            )
        base_section = self._read_base()
        for section, subject in ((base_section, f"{self.folder} was trained with"), (model_config, "the recipe has")):
            if section.quantization is not None:
                raise MergeError(
                    f"{subject} model.quantization={section.quantization}, and an adapter is merged in memory into "
                    "unquantized weights only",
                    _MERGED_COPY.format(run=self.folder),
                )
        if base_section.init == "random":
            raise MergeError(
                f"{self.folder} was trained on random weights (model.init=random), which are not stored in a file",
                _MERGED_COPY.format(run=self.folder),
            )

    def check_base(self, fingerprint: str, config_fingerprint: str | None) -> None:
        """Check that the adapter's base has the fingerprints that it had in training.

        Raises:
            ModelError: it has another.
        """
        is_same_config = may_be_equal(config_fingerprint, self.record.model_config_fingerprint)
        if fingerprint != self.record.model_fingerprint or not is_same_config:
            raise ModelError(
                f"the base model of the run {self.folder} has changed since the run was trained on it",
                "train again, or restore the base model",
            )

    def describe(self) -> str:
        """Return a note for the record of a run that starts from this one."""
        if self.has_adapter:
            base = self._read_base().path
            base = Path(base).name if Path(base).exists() else base
            return f"the base model is the run {self.record.name}: its {self.method} adapter, merged into {base}"
        return f"the base model is the run {self.record.name}: the model that it saved ({self.method})"

    def extend_fingerprint(self, base_fingerprint: str) -> str:
        """Return the fingerprint of the base with this run's adapter."""
        names = ("adapter_model.safetensors", ADAPTER_CONFIG_FILE)
        hashes = [compute_file_hash(self.model_dir / name) for name in names if (self.model_dir / name).exists()]
        return f"{base_fingerprint} + adapter blake2b {' '.join(hashes)}"


def find_run_base(model_config: Model) -> RunBase | None:
    """Return the run whose folder ``model.path`` is, checked; None for any other path.

    Raises:
        ModelNotFoundError: the run is not finished, or has no saved model.
        RecordError: its record cannot be read.
        OutOfRangeError, MergeError: as :meth:`RunBase.check`.
    """
    folder = Path(model_config.path)
    if not (folder / RECORD_FILE).is_file():
        return None
    run = read_finished_run(folder)
    run.check(model_config)
    _check_lineage(run, [])
    return run


def read_finished_run(folder: Path) -> RunBase:
    """Return a run that ended well and saved its model.

    Raises:
        ModelNotFoundError: it has another outcome, or no saved model.
        RecordError: its record cannot be read.
    """
    record = read_record(RunDir(folder).record_file)
    if record.outcome.kind != "ok":
        raise ModelNotFoundError(
            f"the run {folder} ended with the outcome {record.outcome.kind}",
            f"run it again, e.g. peftbench train {RunDir(folder).record_file}",
        )
    method = str(record.recipe["method"]["kind"])
    if method not in METHOD_KINDS:
        raise RecordError(f"the method {method!r} of the run {folder} is unknown", "update peftbench")
    if not METHOD_KINDS[method].is_trainable:
        raise ModelNotFoundError(
            f"the run {folder} is a baseline ({method}), which trains no model",
            "give a run of another method",
        )
    if not has_model_of(folder, record):
        raise ModelNotFoundError(
            f"the run {folder} has no saved model of the training that its record describes",
            "train it again with save_model=true",
        )
    return RunBase(folder, record)


def _check_lineage(run: RunBase, seen: list[Path]) -> None:
    """Check that no run is, through other runs, its own base.

    Raises:
        ModelError: one is.
    """
    folder = run.folder.resolve()
    if folder in seen:
        raise ModelError(f"the run {run.folder} is a base of itself", "train it again, on another base model")
    base = run.record.recipe.get("model", {}).get("path")
    if run.has_adapter and isinstance(base, str) and (Path(base) / RECORD_FILE).is_file():
        _check_lineage(read_finished_run(Path(base)), [*seen, folder])


def merge_adapter(model: PreTrainedModel, run: RunBase) -> PreTrainedModel:
    """Return ``model`` with the run's adapter merged into its weights; all of them can be trained again."""
    merged = _merge_tried(model, run) if run.build_method().needs_trial else _merge_with_peft(model, run)
    if hasattr(merged, "peft_config"):
        del merged.peft_config
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    return merged


def _merge_with_peft(model: PreTrainedModel, run: RunBase) -> PreTrainedModel:
    from peft import PeftModel

    merged: PreTrainedModel = PeftModel.from_pretrained(model, str(run.model_dir)).merge_and_unload()  # type: ignore[operator]
    return merged


def _merge_tried(model: PreTrainedModel, run: RunBase) -> PreTrainedModel:
    """Merge an adapter for which layers of the model may have to be replaced first."""
    method = run.build_method()
    adapted = method.apply(model, None)  # type: ignore[arg-type] # types that are tried need no tokenizer
    method.load(adapted, run.model_dir)
    return method.merge(adapted)


def name_by_run(model: PreTrainedModel, run: RunBase) -> None:
    """Make peft name the run, not the run's own base, as the base of a new adapter."""
    model.name_or_path = str(run.folder)
    model.config.name_or_path = str(run.folder)
