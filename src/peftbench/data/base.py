"""What every source of examples is."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from peftbench.common.schema import ConfigSection

if TYPE_CHECKING:
    from datasets import Dataset

EXAMPLE_COLUMNS = ("id", "article", "summary")


class Source(ConfigSection):
    """What all sources have in common."""

    kind: str
    """Which source."""

    @property
    def is_mutable(self) -> bool:
        """Whether other content may come to lie behind the same recipe, and ``identity`` tells so without a network."""
        return True

    @abstractmethod
    def load(self, split: str) -> Dataset:
        """All examples of ``split`` (train, validation or test), as strings in the columns of ``COLUMNS``.

        Raises:
            DataNotFoundError, HubUnreachableError, MissingColumnError, EmptySplitError: as their names say.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """What exactly was loaded, for the record: a revision or a hash of the content."""
