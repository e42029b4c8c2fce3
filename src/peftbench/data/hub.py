"""Data sets of the Hugging Face Hub, and local copies of their repositories."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import operator
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from peftbench.common.filesystem import UNWRITABLE_ERRNOS
from peftbench.common.schema import PathText
from peftbench.common.text import first_line
from peftbench.data.base import Source
from peftbench.data.example_cache import cache_error, hash_data_file, load_cached_examples
from peftbench.data.local_files import check_first_example, list_faults, load_files, read_column_names
from peftbench.data.readers.arrow_rows import iter_dataset_rows
from peftbench.data.readers.rows import Columns, SplitLocation, iter_examples, to_printable
from peftbench.errors import DataError, DataNotFoundError, EmptySplitError, HubUnreachableError, PeftbenchError

if TYPE_CHECKING:
    from datasets import BuilderConfig, Dataset, DatasetBuilder

_SUFFIXES = {"csv": (".csv",), "json": (".jsonl", ".json", ".ndjson"), "parquet": (".parquet",)}
"""Suffixes of the files that peftbench reads itself, by format."""
_LOCAL_COPY = "to use a local copy, set data.source.path to its folder, or data.source.kind=files with its files"


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
    id: str | None = "id"
    """Column with the example's id; null: use the row number."""

    @property
    def is_mutable(self) -> bool:
        return os.path.exists(self.path)  # noqa: PTH110 — Path.exists raises where it may not look

    @property
    def is_local(self) -> bool:
        return self.is_mutable

    @property
    def has_ids(self) -> bool:
        return self.id is not None

    def check(self, split: str, columns: Columns) -> None:
        self._check_path(split)
        if self.is_mutable and (files := self._find_local_files(self._create_builder(split), split)) is not None:
            check_first_example(files, columns, split)

    def list_faults(self, split: str, columns: Columns) -> list[DataError]:
        self._check_path(split)
        if self.is_mutable and (files := self._find_local_files(self._create_builder(split), split)) is not None:
            return list_faults(files, columns, split)
        return super().list_faults(split, columns)

    def read_column_names(self, split: str) -> list[str]:
        self._check_path(split)
        builder = self._create_builder(split)
        if self.is_mutable and (files := self._find_local_files(builder, split)) is not None:
            return read_column_names(files, split)
        features = builder.info.features
        return list(features if features is not None else self._load_with_library(split, ()).features)

    def load(self, split: str, columns: Columns) -> Dataset:
        self._check_path(split)
        names = tuple(columns.names.values())
        if not self.is_mutable:
            dataset = self._load_with_library(split, names)
            return self._convert(dataset, split, columns, [dataset._fingerprint])
        files = self._find_local_files(self._create_builder(split), split)
        if files is not None:
            return load_files(files, columns, split)
        # The library recognizes a local file by its path and time of change, so each content gets a cache of its own.
        from datasets import config

        content = self.fingerprint()
        cache_dir = str(Path(config.HF_DATASETS_CACHE) / f"peftbench-{content}")
        dataset = self._load_with_library(split, names, cache_dir=cache_dir)
        return self._convert(dataset, split, columns, [content, self.config, split])

    def fingerprint(self, split: str | None = None) -> str:
        """Return the commit on the Hub, or the hash of a local copy's files."""
        self._check_path("train")
        if not self.is_mutable:
            return str(self._create_builder("train").hash)
        folder = Path(self.path)
        digest = hashlib.blake2b(digest_size=16)
        for path in sorted(folder.rglob("*") if folder.is_dir() else [folder]):
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
                hash_data_file(digest, path)
        return digest.hexdigest()

    def _describe(self, split: str) -> str:
        path = to_printable(self.path, 200)
        return f"{path} (config {self.config}, split {split}, revision {self.revision or 'main'})"

    def _check_path(self, split: str) -> None:
        """Refuse a path that is neither a folder nor a name on the Hub, without asking the Hub.

        Raises:
            DataNotFoundError: it is not.
        """
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils._validators import validate_repo_id

        if self.is_mutable:
            return
        try:
            validate_repo_id(self.path)
        except HFValidationError as error:
            fault = "the folder does not exist, and this is not the name of a data set on the Hub"
            raise self._not_found(split, fault) from error

    def _not_found(self, split: str, fault: str) -> DataNotFoundError:
        return DataNotFoundError(
            f"could not load {self._describe(split)} from a folder, the Hub or the cache: {fault}", _LOCAL_COPY
        )

    def _find_broken_link(self) -> str | None:
        """Return a clause about a link in the local copy whose target does not exist."""
        links = (path for path in Path(self.path).rglob("*") if path.is_symlink() and not path.exists())
        link = next(links, None) if self.is_mutable else None
        return None if link is None else f"{link} is a link to {link.readlink()}, which does not exist"

    def _create_builder(self, split: str, **options: object) -> DatasetBuilder:
        from datasets import load_dataset_builder

        try:
            return load_dataset_builder(self.path, self.config, revision=self.revision, **options)
        except Exception as error:
            raise self._translate_error(error, split) from error

    def _load_with_library(self, split: str, names: tuple[str, ...], **options: object) -> Dataset:
        """Load a split with ``datasets``; the cells of these columns of CSV files stay text as written."""
        from datasets import load_dataset
        from datasets.packaged_modules.csv.csv import Csv

        if isinstance(self._create_builder(split), Csv):
            options |= _keep_text(names)
        try:
            return load_dataset(self.path, self.config, split=split, revision=self.revision, **options)  # type: ignore[no-any-return]
        except Exception as error:
            raise self._translate_error(error, split) from error

    def _find_local_files(self, builder: DatasetBuilder, split: str) -> dict[Path, str] | None:
        """Return a split's local files with their format; None if only ``datasets`` can read them.

        Raises:
            EmptySplitError: there is no such split.
        """
        from datasets.packaged_modules.csv.csv import Csv
        from datasets.packaged_modules.json.json import Json
        from datasets.packaged_modules.parquet.parquet import Parquet

        kinds = {Csv: "csv", Json: "json", Parquet: "parquet"}
        kind = next((name for builder_class, name in kinds.items() if isinstance(builder, builder_class)), None)
        files = builder.config.data_files
        if kind is None or files is None or _has_options(builder.config):
            return None
        if split not in files:
            splits = ", ".join(map(str, files))
            raise EmptySplitError(f"{self._describe(split)} does not exist: the folder has the splits {splits}")
        paths = [Path(name) for name in files[split]]
        if not all(path.suffix in _SUFFIXES[kind] and path.is_file() for path in paths):
            return None
        return dict.fromkeys(paths, kind)

    def _convert(self, dataset: Dataset, split: str, columns: Columns, key: list[object]) -> Dataset:
        """Return the used columns as examples."""
        location = SplitLocation(split, self.path)

        def read() -> Iterator[Mapping[str, str]]:
            if len(dataset) == 0:
                raise location.no_examples()
            yield from iter_examples(iter_dataset_rows(dataset, location, columns), columns, location)

        return load_cached_examples([*key, columns.cache_key], columns, read, f"reading {split}")

    def _translate_error(self, error: Exception, split: str) -> PeftbenchError:
        """Map the many errors of ``datasets`` to the few that a user can act on."""
        from datasets.exceptions import DatasetGenerationError

        wanted, chain = self._describe(split), _exception_chain(error)
        for link in chain:
            if isinstance(link, OSError) and _is_file_error(link):
                return self._translate_file_error(link, split)
        if any(isinstance(link, (ConnectionError, TimeoutError)) or _is_network_error(link) for link in chain):
            return HubUnreachableError(f"the Hub did not answer for {wanted}, and the cache has no copy", _LOCAL_COPY)
        has_no_rows = "corresponds to no data" in str(error)
        if has_no_rows or (isinstance(error, ValueError) and "split" in str(error).lower()):
            reason = "has no rows, or none of the used columns" if has_no_rows else f"does not exist: {error}"
            return EmptySplitError(f"{wanted} {reason}", "use a split that has examples")
        if isinstance(error, DatasetGenerationError):
            return DataError(f"{wanted} cannot be read: {first_line(chain[-1], 200)}", "correct its files")
        return self._not_found(split, self._find_broken_link() or first_line(error))

    def _translate_file_error(self, error: OSError, split: str) -> PeftbenchError:
        """Return the error of a file of the local copy or of the cache."""
        from datasets import config

        if error.filename is not None and Path(str(error.filename)).is_relative_to(Path(self.path)):
            return SplitLocation(split, str(error.filename)).read_error(error)
        return cache_error(Path(str(error.filename or config.HF_DATASETS_CACHE)), error)


def _keep_text(names: tuple[str, ...]) -> dict[str, object]:
    """Return the options with which pandas, the CSV reader of ``datasets``, leaves cells as they are written."""
    # Without a filter, an empty cell of a column of numbers is text, and its type would differ between parts of a file.
    used = partial(operator.contains, names)
    return {"converters": dict.fromkeys(names, str), "usecols": used, "na_filter": False}


def _has_options(config: BuilderConfig) -> bool:
    """True if the repository asks for another way to read its files, e.g. another separator."""
    from datasets import BuilderConfig

    general = {field.name for field in dataclasses.fields(BuilderConfig)}
    return any(
        getattr(config, field.name) != field.default
        for field in dataclasses.fields(config)
        if field.name not in general and field.name != "features"
    )


def _is_file_error(error: OSError) -> bool:
    """True if a file, a folder or a full disk caused the error; a network error has no file name."""
    if error.filename is None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return error.errno in UNWRITABLE_ERRNOS | {errno.ENOTDIR, errno.EEXIST}


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
