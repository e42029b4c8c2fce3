"""A small corpus of random words in local files."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from peftbench.data.sources import Files

_TEXT = """harbour council vote bridge river storm school engine market doctor garden winter signal budget minister
train village forest museum player record season island camera student teacher morning evening letter answer"""


_WORDS = _TEXT.split()


def examples(count: int, seed: int) -> list[dict[str, str]]:
    """Return articles of 4 to 30 random words with summaries of 1 to 5 words."""
    generator = torch.Generator().manual_seed(seed)

    def text(low: int, high: int) -> str:
        size = int(torch.randint(low, high + 1, (), generator=generator))
        return " ".join(_WORDS[int(i)] for i in torch.randint(len(_WORDS), (size,), generator=generator))

    return [{"id": f"{seed}-{i}", "article": text(4, 30), "summary": text(1, 5)} for i in range(count)]


def write_corpus(folder: Path, splits: dict[str, list[dict[str, str]]]) -> Files:
    """Write each split to a file and return the source that reads them."""
    for split, split_examples in splits.items():
        lines = [json.dumps(example) + "\n" for example in split_examples]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    paths = {split: str(folder / f"{split}.jsonl") for split in splits}
    return Files(id="id", **paths)  # type: ignore[arg-type]


def write_corpus_with_equal_summaries(folder: Path, times: int = 1) -> Files:
    """Write examples whose summaries are equal and whose articles are repeated ``times`` times; return the source."""
    folder.mkdir(exist_ok=True)
    train = [
        example | {"article": " ".join([example["article"]] * times), "summary": "harbour council vote"}
        for example in examples(24, seed=1)
    ]
    return write_corpus(folder, {"train": train, "validation": train[:4], "test": train[:4]})
