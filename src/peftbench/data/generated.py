"""Sources whose rows peftbench makes itself. A row has the columns of every task, so that each can be tried offline."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from peftbench.data.base import Source
from peftbench.data.readers.rows import Cell, Row, SplitLocation, iter_examples, to_json

if TYPE_CHECKING:
    from datasets import Dataset

    from peftbench.data.readers.rows import Columns

GeneratedRow = Mapping[str, object]
"""Values of JSON's types, by column."""


class GeneratedSource(Source):
    """Base class of a source that makes its rows."""

    @abstractmethod
    def iter_rows(self, split: str) -> Iterator[GeneratedRow]:
        """Yield the rows of a split: ``id`` and the same columns in each."""

    @property
    def id_column(self) -> str:
        return "id"

    @property
    def is_mutable(self) -> bool:
        return False

    def read_column_names(self, split: str) -> list[str]:
        return list(next(self.iter_rows(split)))

    def load(self, split: str, columns: Columns) -> Dataset:
        from datasets import Dataset

        location = SplitLocation(split, f"data.source.kind={self.kind}")
        names = self.read_column_names(split)
        for name in columns.names.values():
            if name not in names:
                raise location.missing_column(name, names)
        rows = (_select_cells(row, columns) for row in self.iter_rows(split))
        return Dataset.from_list([dict(example) for example in iter_examples(rows, columns, location)])


def build_row(id: str, prompt: str, completion: str, choices: Sequence[str], answer: str) -> GeneratedRow:
    """Return a row with the columns of every task."""
    return {
        "id": id,
        "prompt": prompt,
        "completion": completion,
        "messages": [{"role": "user", "content": prompt.strip()}, {"role": "assistant", "content": completion.strip()}],
        "instruction": prompt.strip(),
        "input": "",
        "output": completion.strip(),
        "text": f"{prompt}{completion}",
        "choices": list(choices),
        "answer": answer,
    }


def _select_cells(row: GeneratedRow, columns: Columns) -> Row:
    cells: list[Cell] = []
    for column, name in columns.names.items():
        value = row[name]
        if column in columns.structured:
            cells.append(to_json(value))
        else:
            cells.append(value if isinstance(value, str) else json.dumps(value))
    return None, cells
