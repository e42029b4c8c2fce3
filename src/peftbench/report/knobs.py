"""What was equal between runs and what was not, and how to repeat each."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftbench.literal import INTERPOLATION, literal
from peftbench.record import RunRecord

SHOWN = 12
"""Values of a knob that are listed, at most."""

NAMES = frozenset({"name", "output_dir"})
"""Of a recipe: where a run is written and what it is called change nothing in it."""

_LONGEST = 100
"""Characters of a recipe's file name, at most."""

_SAVE = 'import json,sys; json.dump(json.load(open(sys.argv[1]))["recipe"], open(sys.argv[2], "x"), ensure_ascii=False)'

# OmegaConf would resolve what the recipe has as text, so backslashes go before it: twice as many in JSON's writing.
_SAVE_LITERALLY = (
    r'import json,re,sys; open(sys.argv[2], "x").write(re.sub(r"(\\*)[$][{]", r"\1\1\\\\${", '
    r'json.dumps(json.load(open(sys.argv[1]))["recipe"], ensure_ascii=False)))'
)


@dataclass(frozen=True)
class Knob:
    """One knob of the recipes, or one fact of where they ran, with its values and how many runs have each."""

    name: str
    values: dict[str, int]

    @property
    def shown(self) -> list[tuple[str, int]]:
        """The first ``SHOWN`` values, as (value, runs)."""
        return list(self.values.items())[:SHOWN]

    @property
    def more(self) -> int:
        """How many values are not shown."""
        return max(0, len(self.values) - SHOWN)

    @property
    def equal(self) -> bool:
        """Whether it has one value in all runs."""
        return len(self.values) == 1


def knobs(records: Sequence[RunRecord]) -> list[Knob]:
    """Every knob of any of the recipes (dotted), in their order; a run that has no such knob counts under "–"."""
    flat = [dict(flattened(record.recipe)) for record in records]
    names = dict.fromkeys(name for one in flat for name in one if name not in NAMES)
    return [Knob(name, _counted([_shown(one[name]) if name in one else "–" for one in flat])) for name in names]


def surroundings(records: Sequence[RunRecord]) -> list[Knob]:
    """Device, engine, versions, and the fingerprints of what was trained, on what, by which commit."""
    facts = [_facts(record) for record in records]
    names = dict.fromkeys(name for one in facts for name in one)
    return [Knob(name, _counted([one.get(name) or "unknown" for one in facts])) for name in names]


def _facts(record: RunRecord) -> dict[str, str | None]:
    device, engine = record.device, record.engine
    memory = None if device.memory_bytes is None else f"{device.memory_bytes:,} bytes"
    return {
        "device": f"{device.name} ({device.kind})", "processes": str(device.processes), "device memory": memory,
        "engine": engine.name if engine else "none",
        "arithmetic": engine.mixed_precision if engine else "none",
        "model": record.model_identity or "none", "data": record.data_identity,
        "examples": json.dumps(record.examples), "evaluated on": record.quality.split if record.quality else "nothing",
        "commit": record.git, **record.versions,
    }  # fmt: skip


def _counted(values: Sequence[str]) -> dict[str, int]:
    return {value: values.count(value) for value in dict.fromkeys(values)}


def flattened(values: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, object]]:
    """Every value of nested groups by its dotted place, ``place`` before it; an empty group is a value."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{place}{key}.")
        else:
            yield place + key, value


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def commands(record: RunRecord, place: Path) -> list[str]:
    """What repeats a run from its record at ``place``, in a checkout of peftbench, one command a line.

    The recipe is saved outside the checkout first: the run's commit has no record of the run, or an older one, and may
    not know how to read a recipe from a record. A file that is there already is not written over.
    """
    recipe = f"../{_file_name(record.name)}.json"
    lines = [shlex.join(["python", "-X", "utf8", "-c", _saving(record), str(_from_here(place)), recipe])]
    if record.git is not None:
        lines.append(_checkout(record.git))
    lines.append("pip install -c constraints.txt -e .")
    config = ["--config", recipe, f"output_dir={_again(record)}"]
    engine = record.engine.name if record.engine else None
    processes = record.device.processes
    if engine is None and processes > 1:
        lines.append(f"# it ran in {processes} processes, by a launcher that the record does not name")
    if engine in {None, "single"}:
        return [*lines, shlex.join(["python", "launch/train.py", *config])]
    file = "cpu2" if record.device.kind == "cpu" and engine == "ddp" else engine
    launcher = ["accelerate", "launch", "--config_file", f"accel_configs/{file}.yaml"]
    return [*lines, shlex.join([*launcher, "--num_processes", str(processes), "launch/train.py", *config])]


def _checkout(git: str) -> str:
    """The line that checks out a record's commit. A record may come from anyone: what is no commit may be an option."""
    commit, *changed = git.split("+")
    if not re.fullmatch(r"[0-9a-f]{4,64}", commit):
        return "# its commit is not known"
    return f"git checkout {commit}" + ("  # and it had changes that no commit has" if changed else "")


def _saving(record: RunRecord) -> str:
    """Python that saves the recipe of a record, its first argument, as JSON, which every commit reads as YAML."""
    if any(INTERPOLATION in text for text in _texts(record.recipe)):
        return _SAVE_LITERALLY
    return _SAVE


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for item in value.values() for text in _texts(item))
    elif isinstance(value, (list, tuple)):
        yield from (text for item in value for text in _texts(item))


def _file_name(name: str) -> str:
    """A run's name as that of a file, with nothing that a shell or a file system reads as more."""
    return re.sub(r"[^\w.=,+-]+", "_", name, flags=re.ASCII).lstrip(".-")[:_LONGEST] or "recipe"


def _from_here(place: Path) -> Path:
    """A path below the current directory as seen from there, so that a page that is shared tells less of a machine."""
    return place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else place


def _again(record: RunRecord) -> str:
    """Where the run goes when repeated, as YAML that is read as this text."""
    folder = f"{_from_here(Path(str(record.recipe.get('output_dir', 'runs'))))}_again"
    if re.fullmatch(r"[\w./=+-]+", folder, flags=re.ASCII):
        return folder
    return json.dumps(literal(folder), ensure_ascii=False)
