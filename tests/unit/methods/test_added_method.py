"""The method in docs/guides/methods.md: one file and one row make it available in recipes."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from peftbench.methods import METHOD_KINDS
from peftbench.recipe.loader import parse_recipe, to_commented_yaml
from tests.helpers.models import llama_config, meta_base

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "methods.md"


def test_method_of_the_guide_trains_what_it_states(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe selects it by its kind, its keys are printed, and the second of two blocks is trained."""
    file, row = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)
    kind, class_name = re.fullmatch(r'\s*"(\w+)": (\w+),\n', row).groups()  # type: ignore[union-attr]
    (tmp_path / "alternate_blocks.py").write_text(file, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(METHOD_KINDS._built, kind, getattr(import_module("alternate_blocks"), class_name))
    values = {"name": "run", "data": {"source": {"kind": "docstrings"}}, "train": {"steps": 1}}

    recipe = parse_recipe(values | {"method": {"kind": kind, "first": 1}})

    assert "  first: 1  # Index of the first trained block." in to_commented_yaml(recipe)
    base = meta_base(llama_config())
    count = recipe.method.trainable_parameters(base)
    model = recipe.method.apply(base, tokenizer)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith("model.layers.1.")} != set()
    assert count == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
