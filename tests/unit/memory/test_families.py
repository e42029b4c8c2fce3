"""The bundled families have the exact parameter counts of the published models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from peftbench.errors import BudgetError
from peftbench.memory.families import Family, FamilyMember, get_family, load_families, with_bundled_config
from peftbench.recipe.schema import Model

ALL = [(name, family, member) for name, family in load_families().items() for member in family.members]


def test_families_are_sorted_by_size() -> None:
    """The error for an unknown family suggests the nearest name."""
    assert set(load_families()) == {"gpt2", "llama3", "qwen2.5"}
    for family in load_families().values():
        sizes = [member.parameters for member in family.members]
        assert sizes == sorted(sizes)
        assert len(sizes) >= 4
    with pytest.raises(BudgetError, match=r"Unknown model family 'gpt3'; did you mean 'gpt2'"):
        get_family("gpt3")


@pytest.mark.parametrize(("name", "family", "member"), ALL, ids=[member.name for _, _, member in ALL])
def test_parameter_count_matches_transformers(name: str, family: Family, member: FamilyMember) -> None:
    """Transformers builds the model on the meta device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**family.config | member.config))
    assert model.num_parameters() == member.parameters
    assert model.config.model_type == {"gpt2": "gpt2", "llama3": "llama", "qwen2.5": "qwen2"}[name]


def test_bundled_config_is_used_only_for_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with a revision, or with a local folder of that name, does not use it."""
    with with_bundled_config(Model(path="openai-community/gpt2-xl")) as bundled:
        assert AutoConfig.from_pretrained(bundled.path).n_layer == 48
    assert not Path(bundled.path).exists()
    for other in (Model(path="openai-community/gpt2-xl", revision="main"), Model(path="openai-community/gpt3")):
        with with_bundled_config(other) as unchanged:
            assert unchanged == other
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openai-community" / "gpt2-xl").mkdir(parents=True)
    with with_bundled_config(Model(path="openai-community/gpt2-xl")) as unchanged:
        assert unchanged.path == "openai-community/gpt2-xl"
