"""Which run of one folder is which of another, and what changed in what they were asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peftbench.common.schema import RecordModel
from peftbench.errors import RecordError
from peftbench.record import RunRecord, read_records_by_path
from peftbench.report.runs import sort_records
from peftbench.report.settings import NAMING_KEYS, flatten

MatchedBy = Literal["name", "recipe", "path"]


class SettingChange(RecordModel):
    """One knob, or one fact of where and with what a run was made, that is not what it was."""

    key: str
    """Dotted, as train.steps; of what is no knob: versions.torch, device.name, engine.kind, git, data_identity."""
    before: Any = None
    after: Any = None
    only_in: Literal["A", "B"] | None = None
    """Where just one of the two runs has such a knob at all; the other's value is then None."""


@dataclass(frozen=True)
class Runs:
    """All records below a folder, by their own folders' paths below it."""

    folder: Path
    by_path: Mapping[str, RunRecord]

    @classmethod
    def load(cls, folder: Path) -> Runs:
        """Read them.

        Raises:
            RecordError: there are none, one cannot be read, or two have the same name.
        """
        by_path = {
            path.parent.relative_to(folder).as_posix(): record for path, record in read_records_by_path(folder).items()
        }
        first: dict[str, str] = {}
        for path, record in by_path.items():
            if record.name in first:
                raise RecordError(
                    f"{folder} has two records of a run named {record.name!r}, in {first[record.name]} and {path}; "
                    "give a folder in which each name is once, as that of one suite"
                )
            first[record.name] = path
        return cls(folder, by_path)


@dataclass(frozen=True)
class Match:
    """Two records that are of the same run; one of them is None where the other folder has none."""

    before: RunRecord | None
    after: RunRecord | None
    matched_by: MatchedBy | None = None


def match_runs(before: Runs, after: Runs) -> list[Match]:
    """Every run of either folder once: those of ``before`` in a report's order, then the new ones.

    Names come first, then recipes, then paths. What would fit several runs matches none, since any choice would be a
    guess.
    """
    left, right = dict(before.by_path), dict(after.by_path)
    found: dict[int, Match] = {}
    keys: list[tuple[MatchedBy, Callable[[str, RunRecord], Hashable]]] = [
        ("name", lambda path, record: record.name),
        ("recipe", lambda path, record: record.recipe_fingerprint),
        ("path", lambda path, record: path),
    ]
    for by, key in keys:
        here, there = _unique_paths_by_key(left, key), _unique_paths_by_key(right, key)
        for value in here.keys() & there.keys():
            one, other = left.pop(here[value]), right.pop(there[value])
            found[id(one)] = Match(one, other, by)
    pairs = [found.get(id(one), Match(one, None)) for one in sort_records(list(before.by_path.values()))]
    return pairs + [Match(None, other) for other in sort_records(list(right.values()))]


def _unique_paths_by_key(
    runs: Mapping[str, RunRecord], key: Callable[[str, RunRecord], Hashable]
) -> dict[Hashable, str]:
    """Paths of those runs whose key no other of them has."""
    keys = {path: key(path, record) for path, record in runs.items()}
    often = Counter(keys.values())
    return {value: path for path, value in keys.items() if often[value] == 1}


def diff_settings(before: RunRecord, after: RunRecord) -> tuple[SettingChange, ...]:
    """What differs between two runs beside their figures: knobs first, then where and with what they were made."""
    return (
        *_diff_values(_recipe_settings(before), _recipe_settings(after)),
        *_diff_values(_environment_facts(before), _environment_facts(after)),
    )


def _diff_values(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[SettingChange]:
    for knob in dict.fromkeys((*old, *new)):
        if knob not in new:
            yield SettingChange(key=knob, before=old[knob], only_in="A")
        elif knob not in old:
            yield SettingChange(key=knob, after=new[knob], only_in="B")
        elif not _is_equal(old[knob], new[knob]):
            yield SettingChange(key=knob, before=old[knob], after=new[knob])


def _recipe_settings(record: RunRecord) -> dict[str, Any]:
    return dict(flatten({key: value for key, value in record.recipe.items() if key not in NAMING_KEYS}))


def _environment_facts(record: RunRecord) -> dict[str, Any]:
    fields = {"library_versions", "device", "engine", "git_commit", "data_fingerprint", "model_fingerprint"}
    return dict(flatten(record.model_dump(mode="json", include=fields)))


def _is_equal(first: object, second: object) -> bool:
    # Python has True == 1, and a knob that was a number and is a switch now has changed.
    return bool(first == second) and isinstance(first, bool) == isinstance(second, bool)
