"""Base class of the sources of examples."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from peftbench.common.schema import ConfigSection
from peftbench.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

    from peftbench.data.readers.rows import Columns


class Source(ConfigSection):
    """Base class of a source of examples."""

    kind: str
    """Kind of source."""

    @property
    def id_column(self) -> str | None:
        """Column with the example's id; None: the row number is the id."""
        return getattr(self, "id", None)

    @property
    def implied_task(self) -> str | None:
        """Kind of the task for ``task.kind=auto`` if it does not depend on the names of the columns."""
        return None

    @property
    def is_mutable(self) -> bool:
        """True if content can change under an unchanged recipe; ``fingerprint`` detects that without a network."""
        return True

    @property
    def is_local(self) -> bool:
        """True if it can be read without the network."""
        return True

    @property
    def has_ids(self) -> bool:
        """True if ids identify an example among all splits; False if they are row numbers."""
        return True

    def is_same_file(self, first: str, second: str) -> bool:
        """True if both splits are read from one file, or from files of equal content."""
        return False

    def check(self, split: str, columns: Columns) -> None:
        """Check what can be checked of a split at once, without the network and without reading all of it.

        Raises:
            DataError: a path, a column or the first example is not usable.
        """

    @abstractmethod
    def read_column_names(self, split: str) -> list[str]:
        """Return the names of the columns of a split.

        Raises:
            PeftbenchError: as in :meth:`load`.
        """

    def list_faults(self, split: str, columns: Columns) -> list[DataError]:
        """Return what is wrong with the rows of a split, one error per faulty row as far as they can be read on.

        Raises:
            PeftbenchError: as in :meth:`load`, if the error is not that of a row.
        """
        try:
            self.load(split, columns)
        except DataError as error:
            return [error]
        return []

    @abstractmethod
    def load(self, split: str, columns: Columns) -> Dataset:
        """Return all examples of ``split`` (train, validation or test), as strings: ``id`` and the columns' names.

        Raises:
            DataError: the split cannot be loaded; DataNotFoundError, HubUnreachableError, MissingColumnError or
                EmptySplitError if that is the reason.
            OutputError: the cache cannot be written.
        """

    @abstractmethod
    def fingerprint(self, split: str | None = None) -> str:
        """Return the identity of the loaded data for the record: a revision or a hash of the content.

        With ``split``, of that split alone if its files are known.
        """
