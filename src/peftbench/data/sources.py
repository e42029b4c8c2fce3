"""Sources of examples. Every source returns the columns ``id``, ``article`` and ``summary``."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union

from pydantic import Field, field_validator

from peftbench.common.filesystem import UNWRITABLE_ERRNOS, write_error
from peftbench.common.schema import PathText
from peftbench.data.base import EXAMPLE_COLUMNS, Source
from peftbench.data.file_errors import explain_unreadable_file
from peftbench.data.synthetic import Synthetic
from peftbench.errors import (
    DataError,
    DataNotFoundError,
    EmptySplitError,
    HubUnreachableError,
    MissingColumnError,
    did_you_mean,
)

if TYPE_CHECKING:
    from datasets import Dataset

_EMPTY_FILE_MESSAGES = (
    "corresponds to no data",
    "BatchSize must be greater than 0",
)  # errors of ``datasets`` for a file without rows


class Docstrings(Source):
    """Summary lines and the rest of their docstrings: the offline default."""

    kind: Literal["docstrings"] = "docstrings"
    """Kind of source."""

    def load(self, split: str) -> Dataset:
        from peftbench.data.docstring_corpus import cache_pair_files

        paths, _ = cache_pair_files()
        dataset = _load_file("json", paths[split])
        return _select_columns(
            dataset, {"id": "location", "article": "article", "summary": "summary"}, split, str(paths[split])
        )

    def fingerprint(self, split: str | None = None) -> str:
        from peftbench.data.docstring_corpus import cache_pair_files

        return cache_pair_files()[1]


class Files(Source):
    """Local files, one per split."""

    kind: Literal["files"] = "files"
    """Kind of source."""
    train: PathText
    """File of the training split: .jsonl, .csv or .parquet; a relative path starts at the working directory."""
    validation: PathText | None = None
    """File of the validation split."""
    test: PathText | None = None
    """File of the test split."""
    article: str = "article"
    """Column with the text to summarize."""
    summary: str = "summary"
    """Column with the summary."""
    id: str | None = None
    """Column with the example's id; null: use the row number."""

    FORMATS: ClassVar[dict[str, str]] = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}

    @field_validator("train", "validation", "test")
    @classmethod
    def _check_format(cls, value: str | None) -> str | None:
        if value is not None and Path(value).suffix not in cls.FORMATS:
            raise ValueError(f"must be a file that ends in {', '.join(cls.FORMATS)}, not {value!r}")
        return value

    def load(self, split: str) -> Dataset:
        path = self._split_path(split)
        dataset = _load_file(self.FORMATS[path.suffix], path)
        return _select_columns(
            dataset, {"id": self.id, "article": self.article, "summary": self.summary}, split, str(path)
        )

    def fingerprint(self, split: str | None = None) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for name in (self.train, self.validation, self.test) if split is None else (getattr(self, split),):
            if name is not None and Path(name).is_file():
                _hash_file(digest, Path(name))
        return digest.hexdigest()

    @property
    def has_ids(self) -> bool:
        return self.id is not None

    def is_same_file(self, first: str, second: str) -> bool:
        return self.fingerprint(first) == self.fingerprint(second)

    def _split_path(self, split: str) -> Path:
        name = getattr(self, split)
        if name is None:
            raise EmptySplitError(
                f"this recipe needs a {split} split, but data.source.{split} is not set; set it to the path of a file"
            )
        path = Path(name)
        if not path.is_file():
            raise DataNotFoundError(
                f"data.source.{split}={name!r} does not exist (tried {path.absolute()}); "
                "set it to the path of a local file"
            )
        return path


class Hub(Source):
    """A dataset on the Hugging Face Hub, or a local copy of its repository."""

    kind: Literal["hub"] = "hub"
    """Kind of source."""
    path: PathText = "abisee/cnn_dailymail"
    """Name of the dataset on the Hub, or the folder of a local copy."""
    config: str | None = "3.0.0"
    """Configuration of the dataset; null: its default."""
    revision: str | None = None
    """Branch, tag or commit on the Hub. The record has the commit that was loaded."""
    article: str = "article"
    """Column with the text to summarize."""
    summary: str = "highlights"
    """Column with the summary."""
    id: str | None = "id"
    """Column with the example's id; null: use the row number."""

    @property
    def is_mutable(self) -> bool:
        return Path(self.path).exists()

    @property
    def has_ids(self) -> bool:
        return self.id is not None

    def load(self, split: str) -> Dataset:
        from datasets import load_dataset

        try:
            dataset: Dataset = load_dataset(self.path, self.config, split=split, revision=self.revision)
        except Exception as error:
            raise self._translate_error(error, split) from error
        return _select_columns(
            dataset, {"id": self.id, "article": self.article, "summary": self.summary}, split, self.path
        )

    def fingerprint(self, split: str | None = None) -> str:
        """Return the commit on the Hub, or the hash of a local copy's files."""
        folder = Path(self.path)
        if folder.exists():
            digest = hashlib.blake2b(digest_size=16)
            for path in sorted(folder.rglob("*") if folder.is_dir() else [folder]):
                if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
                    _hash_file(digest, path)
            return digest.hexdigest()
        from datasets import load_dataset_builder

        try:
            builder = load_dataset_builder(self.path, self.config, revision=self.revision)
        except Exception as error:
            raise self._translate_error(error, "train") from error
        return str(builder.hash)

    def _translate_error(self, error: Exception, split: str) -> DataError:
        """Map the many errors of ``datasets`` to the three that a user can act on."""
        wanted = f"{self.path} (config {self.config}, split {split}, revision {self.revision or 'main'})"
        local = "to use a local copy, set data.source.path to its folder, or data.source.kind=files with its files"
        chain = _exception_chain(error)
        if any(isinstance(link, (ConnectionError, TimeoutError)) or _is_network_error(link) for link in chain):
            return HubUnreachableError(f"the Hub did not answer for {wanted}, and the cache has no copy", local)
        if isinstance(error, ValueError) and "split" in str(error).lower():
            return EmptySplitError(f"{wanted} does not exist: {error}")
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return DataNotFoundError(f"could not load {wanted} from a folder, the Hub or the cache: {first}", local)


def _hash_file(digest: hashlib.blake2b, path: Path) -> None:
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def dataset_cache_dir(dataset: Dataset) -> Path:
    """Return the folder where ``datasets`` caches what it derives from ``dataset``."""
    return Path(dataset.cache_files[0]["filename"]).parent if dataset.cache_files else Path(tempfile.gettempdir())


def _exception_chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return chain


def _is_network_error(error: BaseException) -> bool:
    """True if an HTTP client could not connect, whichever client huggingface_hub uses."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)) or bool(
        names & {"ConnectError", "ConnectTimeout", "TransportError", "NetworkError", "ProxyError", "MaxRetryError"}
    )


def _load_file(builder: str, path: Path) -> Dataset:
    """Load one file as a dataset, through ``datasets`` and its cache."""
    from datasets import load_dataset
    from datasets.config import HF_DATASETS_CACHE
    from datasets.exceptions import DatasetGenerationError

    if path.stat().st_size == 0:
        raise EmptySplitError(f"{path} is empty; give a file with at least one example")
    try:
        return load_dataset(builder, data_files={"only": str(path)}, split="only")  # type: ignore[return-value]
    except (DatasetGenerationError, ValueError, OSError) as error:
        last = _exception_chain(error)[-1]
        if isinstance(last, OSError) and last.errno in UNWRITABLE_ERRNOS:
            raise write_error(Path(last.filename or HF_DATASETS_CACHE), last) from error
        if any(message in str(last) for message in _EMPTY_FILE_MESSAGES):
            raise EmptySplitError(f"{path} has no examples; give a file with at least one") from error
        raise DataError(
            f"{path} cannot be read as {builder}: {explain_unreadable_file(path, builder)}; correct the file"
        ) from error


def _select_columns(dataset: Dataset, column_names: dict[str, str | None], split: str, location: str) -> Dataset:
    """Select the three columns under their standard names, as text; drop the others."""
    from datasets import Features, Value

    for name in column_names.values():
        if name is not None and name not in dataset.column_names:
            raise MissingColumnError(
                f"the {split} split of {location} has no column {name!r}; {did_you_mean(name, dataset.column_names)}"
            )
    if len(dataset) == 0:
        raise EmptySplitError(f"the {split} split of {location} has no examples; use a split that has at least one")

    def renamed(row: dict[str, Any], index: int) -> dict[str, str]:
        for column, name in column_names.items():
            if name is None:
                continue
            if isinstance(row[name], (list, dict)):
                raise DataError(
                    f"column {name!r} of the {split} split of {location} does not contain text; use a column that does"
                )
            # str() would turn a missing value into the text "None".
            if row[name] is None or (column != "id" and not str(row[name]).strip()):
                raise DataError(
                    f"example {index} of the {split} split of {location} has no {name}; fill it in or leave it out"
                )
        return {column: str(index if name is None else row[name]) for column, name in column_names.items()}

    # Without explicit types, datasets casts text back to the type that a column of the same name had before.
    text = Features({column: Value("string") for column in EXAMPLE_COLUMNS})
    try:
        return dataset.map(
            renamed, with_indices=True, remove_columns=dataset.column_names, features=text, desc=f"reading {split}"
        )
    except OSError as error:
        raise write_error(dataset_cache_dir(dataset), error) from error


SOURCES: dict[str, type[Source]] = {"docstrings": Docstrings, "files": Files, "hub": Hub, "synthetic": Synthetic}

if TYPE_CHECKING:
    AnySource = Source
else:
    AnySource = Annotated[Union[tuple(SOURCES.values())], Field(discriminator="kind")]
