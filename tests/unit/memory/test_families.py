"""The bundled families have the parameter counts of the published models."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from peftbench.errors import BudgetError
from peftbench.memory.families import (
    Family,
    FamilyMember,
    find_member,
    get_family,
    list_model_names,
    load_families,
    with_bundled_config,
)
from peftbench.recipe.schema import Model
from tests.helpers.paths import REPOSITORY

ALL = [(family, member) for family in load_families().values() for member in family.members]
BY_NAME = pytest.mark.parametrize(("family", "member"), ALL, ids=[member.name for _, member in ALL])

_UNITS = {"": 1, "M": 10**6, "B": 10**9}


def test_twenty_families_are_sorted_by_size() -> None:
    """The largest model that fits is searched from the end."""
    assert len(load_families()) >= 20
    for family in load_families().values():
        sizes = [member.parameters for member in family.members]
        assert sizes == sorted(sizes)


def test_an_unknown_family_is_refused_with_the_nearest_name() -> None:
    """The error lists all families."""
    with pytest.raises(BudgetError, match=r"Unknown model family 'gpt3'; did you mean 'gpt2'.*qwen3"):
        get_family("gpt3")


def test_documentation_lists_all_families() -> None:
    """The page has the names that --largest-model takes."""
    text = (REPOSITORY / "docs" / "concepts" / "memory.md").read_text(encoding="utf-8")
    paragraph = text.partition("`--largest-model` tries")[2].partition("\n\n")[0]
    assert set(load_families()) <= set(re.findall(r"`([^`]+)`", paragraph))


@BY_NAME
def test_parameter_count_matches_transformers_and_the_published_number(family: Family, member: FamilyMember) -> None:
    """Transformers builds the model on the meta device; a rounded number agrees in all its digits."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**family.merge_config(member)))
    assert type(model).__name__ in family.config["architectures"]
    assert model.num_parameters() == member.parameters
    digits, unit = re.fullmatch(r"([\d.]+)([MB]?)", member.published, re.ASCII).groups()  # type: ignore[union-attr]
    decimals = len(digits.partition(".")[2])
    assert f"{member.parameters / _UNITS[unit]:.{decimals}f}" == digits


@BY_NAME
def test_transformers_knows_every_key_of_a_config(family: Family, member: FamilyMember) -> None:
    """A misspelled key would be kept as an attribute that nothing reads."""
    config = family.merge_config(member)
    known = AutoConfig.for_model(config["model_type"])
    legacy = {"rope_theta", "rope_scaling", "rotary_pct", "partial_rotary_factor"}  # now parts of rope_parameters
    unknown = {key for key in config if not hasattr(known, key)} - legacy
    assert not unknown
    assert not legacy & set(config) or known.rope_parameters


def test_every_name_finds_its_model() -> None:
    """Case and owner may be left out; no name belongs to two models."""
    assert max(Counter(list_model_names()).values()) == 1
    for family, member in ALL:
        for name in member.names:
            assert find_member(name) == (family, member)
            assert find_member(name.upper()) == (family, member)
            assert find_member(name.rpartition("/")[2]) == (family, member)
    assert find_member("Qwen/Qwen2.5-8B") is None
    assert find_member("another-owner/Qwen2.5-7B") is None


def test_name_of_two_owners_needs_the_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name without an owner is found only if one model has it."""
    family, member = get_family("qwen3"), get_family("qwen3").members[0]
    copy = member.model_copy(update={"name": f"someone/{member.name.partition('/')[2]}"})
    twice = {"qwen3": family.model_copy(update={"members": (member, copy)})}
    monkeypatch.setattr("peftbench.memory.families.load_families", lambda: twice)
    found = find_member(copy.name)
    assert found is not None
    assert found[1] == copy
    assert find_member(member.name.partition("/")[2]) is None


def test_merged_config_is_a_copy() -> None:
    """Transformers adds keys to a nested dictionary, which must not reach the next model."""
    family = get_family("llama3")
    member = family.members[0]
    family.merge_config(member)["rope_scaling"]["factor"] = 0
    assert family.merge_config(member)["rope_scaling"]["factor"] == 32


def test_bundled_config_is_used_only_for_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with a revision, or with a local folder of that name, does not use it."""
    for name in ("openai-community/gpt2-xl", "gpt2-xl"):
        with with_bundled_config(Model(path=name)) as bundled:
            assert AutoConfig.from_pretrained(bundled.path).n_layer == 48
    assert not Path(bundled.path).exists()
    for other in (
        Model(path="openai-community/gpt2-xl", revision="main"),
        Model(path="openai-community/gpt3"),
        Model(path="Qwen2.5-7B"),
    ):
        with with_bundled_config(other) as unchanged:
            assert unchanged == other
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openai-community" / "gpt2-xl").mkdir(parents=True)
    with with_bundled_config(Model(path="openai-community/gpt2-xl")) as unchanged:
        assert unchanged.path == "openai-community/gpt2-xl"
