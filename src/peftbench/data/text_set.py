"""A text made of the rows of a data set on the Hub."""

from __future__ import annotations

from typing import Annotated

from pydantic import Discriminator, Field, Tag

from peftbench.common.schema import ConfigSection, PathText
from peftbench.errors import DataError


class TextSet(ConfigSection):
    """The first rows of a data set on the Hub, or of a local copy of its repository, as one text."""

    path: PathText
    """Name of the data set on the Hub, or the folder of a local copy."""
    config: str | None = None
    """Configuration of the data set; null: its default."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    split: str = "validation"
    """Split of the data set."""
    column: str = "text"
    """Column with text; cells may be empty."""
    rows: int = Field(default=1000, gt=0)
    """Largest number of rows, from the first on."""

    @property
    def name(self) -> str:
        """Name for the record, e.g. ``Salesforce/wikitext (wikitext-2-raw-v1, validation)``."""
        return f"{self.path} ({', '.join(part for part in (self.config, self.split) if part)})"

    def read(self) -> str:
        """Return the rows, one below the other.

        Raises:
            DataError: the split cannot be loaded, or lacks the column.
        """
        from peftbench.data.hub import Hub
        from peftbench.data.readers.rows import Columns

        source = Hub(path=self.path, config=self.config, revision=self.revision, id=None)
        columns = Columns({"text": self.column}, optional=frozenset({"text"}))
        try:
            examples = source.load(self.split, columns)
        except DataError as error:
            message = f"evaluate.general_text cannot be read: {error.message}"
            raise type(error)(message, "set its path, config, split and column to those of a data set") from error
        texts = examples[: self.rows]["text"]
        return "\n".join(text.rstrip("\n") for text in texts)


def _name_form(value: object) -> str:
    """Return the tag of the form in which a text is given; tags have a space, unlike keys."""
    return "a data set" if isinstance(value, (dict, TextSet)) else "a path"


AnyText = Annotated[
    Annotated[PathText, Tag("a path")] | Annotated[TextSet, Tag("a data set")], Discriminator(_name_form)
]
"""The path of a file, or a data set."""
