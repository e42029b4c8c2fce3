"""Match the runs of two folders, and compare their settings and environment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peftbench.common.nested_keys import flatten_keys
from peftbench.common.schema import RecordModel
from peftbench.errors import RecordError
from peftbench.record import RunRecord, scan_records
from peftbench.report.runs import sort_records
from peftbench.report.settings import NAMING_KEYS

MatchedBy = Literal["name", "recipe", "path"]


class SettingChange(RecordModel):
    """A changed recipe key or property of the environment."""

    key: str
    """Dotted recipe key, e.g. train.steps, or record field, e.g. library_versions.torch, device.name, git_commit."""
    before: Any = None
    after: Any = None
    only_in: Literal["A", "B"] | None = None
    """Set if only one of the runs has the key; the other's value is then None."""


@dataclass(frozen=True)
class Runs:
    """All records below a folder, keyed by the relative path of their folder."""

    folder: Path
    by_path: Mapping[str, RunRecord]
    unreadable: tuple[str, ...] = ()
    """Sentences on the records that cannot be read."""

    @classmethod
    def load(cls, folder: Path) -> Runs:
        """Read all records that can be read.

        Raises:
            RecordError: there is none, or two have the same name.
        """
        scan = scan_records(folder)
        by_path = {path.parent.relative_to(folder).as_posix(): record for path, record in scan.records.items()}
        first: dict[str, str] = {}
        for path, record in by_path.items():
            if record.name in first:
                raise RecordError(
                    f"{folder} has two runs named {record.name!r}, in {first[record.name]} and {path}; run names must "
                    "be unique, so give the folder of a single suite"
                )
            first[record.name] = path
        return cls(folder, by_path, tuple(scan.unreadable.values()))


@dataclass(frozen=True)
class Match:
    """Two records of the same run; one is None if only the other folder has it."""

    before: RunRecord | None
    after: RunRecord | None
    matched_by: MatchedBy | None = None


def match_runs(before: Runs, after: Runs) -> list[Match]:
    """Return every run of either folder once: those of ``before`` in report order, then the new ones.

    Runs are matched by name, then by recipe, then by path. An ambiguous key matches nothing.
    """
    left, right = dict(before.by_path), dict(after.by_path)
    matches: dict[int, Match] = {}
    keys: list[tuple[MatchedBy, Callable[[str, RunRecord], Hashable]]] = [
        ("name", lambda path, record: record.name),
        ("recipe", lambda path, record: record.recipe_fingerprint),
        ("path", lambda path, record: path),
    ]
    for by, key in keys:
        left_paths, right_paths = _unique_paths_by_key(left, key), _unique_paths_by_key(right, key)
        for value in left_paths.keys() & right_paths.keys():
            old, new = left.pop(left_paths[value]), right.pop(right_paths[value])
            matches[id(old)] = Match(old, new, by)
    pairs = [matches.get(id(old), Match(old, None)) for old in sort_records(list(before.by_path.values()))]
    return pairs + [Match(None, new) for new in sort_records(list(right.values()))]


def _unique_paths_by_key(
    runs: Mapping[str, RunRecord], key: Callable[[str, RunRecord], Hashable]
) -> dict[Hashable, str]:
    """Return the paths of the runs with a unique key, by key."""
    keys = {path: key(path, record) for path, record in runs.items()}
    counts = Counter(keys.values())
    return {value: path for path, value in keys.items() if counts[value] == 1}


def diff_settings(before: RunRecord, after: RunRecord) -> tuple[SettingChange, ...]:
    """Return the differences between two runs except metrics: recipe keys first, then the environment."""
    return (
        *_diff_values(_recipe_settings(before), _recipe_settings(after)),
        *_diff_values(_environment_facts(before), _environment_facts(after)),
    )


def _diff_values(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[SettingChange]:
    for key in dict.fromkeys((*old, *new)):
        if key not in new:
            yield SettingChange(key=key, before=old[key], only_in="A")
        elif key not in old:
            yield SettingChange(key=key, after=new[key], only_in="B")
        elif not _is_equal(old[key], new[key]):
            yield SettingChange(key=key, before=old[key], after=new[key])


def _recipe_settings(record: RunRecord) -> dict[str, Any]:
    return dict(flatten_keys({key: value for key, value in record.recipe.items() if key not in NAMING_KEYS}))


def _environment_facts(record: RunRecord) -> dict[str, Any]:
    fingerprints = {"data_fingerprint", "model_fingerprint", "model_config_fingerprint"}
    fields = {"library_versions", "device", "engine", "git_commit", *fingerprints}
    return dict(flatten_keys(record.model_dump(mode="json", include=fields)))


def _is_equal(first: object, second: object) -> bool:
    # In Python True == 1, but a key that changed from a number to a boolean has changed.
    return bool(first == second) and isinstance(first, bool) == isinstance(second, bool)
