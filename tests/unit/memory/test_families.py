"""Families are as published: each model's parameters, to the last."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from peftbench.errors import BudgetError
from peftbench.memory.families import Family, FamilyMember, get_family, load_families, with_bundled_config
from peftbench.recipe.schema import Model

ALL = [(name, family, member) for name, family in load_families().items() for member in family.members]


def test_there_are_some() -> None:
    """In order, the smallest first, and another name gives the nearest."""
    assert set(load_families()) == {"gpt2", "llama3", "qwen2.5"}
    for family in load_families().values():
        sizes = [member.parameters for member in family.members]
        assert sizes == sorted(sizes)
        assert len(sizes) >= 4
    with pytest.raises(BudgetError, match=r"no family of models is called 'gpt3' here; did you mean 'gpt2'"):
        get_family("gpt3")


@pytest.mark.parametrize(("name", "family", "member"), ALL, ids=[member.name for _, _, member in ALL])
def test_as_many_parameters_as_published(name: str, family: Family, member: FamilyMember) -> None:
    """Of the model that transformers makes of the config, on the meta device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**family.config | member.config))
    assert model.num_parameters() == member.parameters
    assert model.config.model_type == {"gpt2": "gpt2", "llama3": "llama", "qwen2.5": "qwen2"}[name]


def test_a_config_at_hand_is_for_a_name_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for a revision, which may be another, and not where a folder has that name."""
    with with_bundled_config(Model(path="openai-community/gpt2-xl")) as found:
        assert AutoConfig.from_pretrained(found.path).n_layer == 48
    assert not Path(found.path).exists()
    for other in (Model(path="openai-community/gpt2-xl", revision="main"), Model(path="openai-community/gpt3")):
        with with_bundled_config(other) as kept:
            assert kept == other
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openai-community" / "gpt2-xl").mkdir(parents=True)
    with with_bundled_config(Model(path="openai-community/gpt2-xl")) as kept:
        assert kept.path == "openai-community/gpt2-xl"
