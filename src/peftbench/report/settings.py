"""What was equal between runs and what was not, and how to repeat each."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftbench.common.text import INTERPOLATION_PREFIX, escape_interpolation
from peftbench.record import RunRecord

MAX_SHOWN_VALUES = 12
"""Values of a knob that are listed, at most."""

NAMING_KEYS = frozenset({"name", "output_dir"})
"""Of a recipe: where a run is written and what it is called change nothing in it."""

_MAX_FILE_NAME_CHARS = 100
"""Characters of a recipe's file name, at most."""

_SAVE_RECIPE_SCRIPT = (
    'import json,sys; json.dump(json.load(open(sys.argv[1]))["recipe"], open(sys.argv[2], "x"), ensure_ascii=False)'
)

# OmegaConf would resolve what the recipe has as text, so backslashes go before it: twice as many in JSON's writing.
_SAVE_ESCAPED_RECIPE_SCRIPT = (
    r'import json,re,sys; open(sys.argv[2], "x").write(re.sub(r"(\\*)[$][{]", r"\1\1\\\\${", '
    r'json.dumps(json.load(open(sys.argv[1]))["recipe"], ensure_ascii=False)))'
)


@dataclass(frozen=True)
class Setting:
    """One knob of the recipes, or one fact of where they ran, with its values and how many runs have each."""

    name: str
    runs_by_value: dict[str, int]

    @property
    def shown_values(self) -> list[tuple[str, int]]:
        """The first ``SHOWN`` values, as (value, runs)."""
        return list(self.runs_by_value.items())[:MAX_SHOWN_VALUES]

    @property
    def num_hidden_values(self) -> int:
        """How many values are not shown."""
        return max(0, len(self.runs_by_value) - MAX_SHOWN_VALUES)

    @property
    def is_constant(self) -> bool:
        """Whether it has one value in all runs."""
        return len(self.runs_by_value) == 1


def recipe_settings(records: Sequence[RunRecord]) -> list[Setting]:
    """Every knob of any of the recipes (dotted), in their order; a run that has no such knob counts under "–"."""
    flat = [dict(flatten(record.recipe)) for record in records]
    names = dict.fromkeys(name for one in flat for name in one if name not in NAMING_KEYS)
    return [
        Setting(name, _count_values([_format_value(one[name]) if name in one else "–" for one in flat]))
        for name in names
    ]


def environment_settings(records: Sequence[RunRecord]) -> list[Setting]:
    """Device, engine, versions, and the fingerprints of what was trained, on what, by which commit."""
    facts = [_environment_facts(record) for record in records]
    names = dict.fromkeys(name for one in facts for name in one)
    return [Setting(name, _count_values([one.get(name) or "unknown" for one in facts])) for name in names]


def _environment_facts(record: RunRecord) -> dict[str, str | None]:
    device, engine = record.device, record.engine
    memory = None if device.memory_bytes is None else f"{device.memory_bytes:,} bytes"
    return {
        "device": f"{device.name} ({device.type})",
        "processes": str(device.num_processes),
        "device memory": memory,
        "engine": engine.name if engine else "none",
        "arithmetic": engine.mixed_precision if engine else "none",
        "model": record.model_fingerprint or "none",
        "data": record.data_fingerprint,
        "examples": json.dumps(record.num_examples),
        "evaluated on": record.quality.split if record.quality else "nothing",
        "commit": record.git_commit,
        **record.library_versions,
    }


def _count_values(values: Sequence[str]) -> dict[str, int]:
    return {value: values.count(value) for value in dict.fromkeys(values)}


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every value of nested groups by its dotted place, ``place`` before it; an empty group is a value."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _format_value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def reproduce_commands(record: RunRecord, record_path: Path) -> list[str]:
    """What repeats a run from its record at ``place``, in a checkout of peftbench, one command a line.

    The recipe is saved outside the checkout first: the run's commit has no record of the run, or an older one, and may
    not know how to read a recipe from a record. A file that is there already is not written over.
    """
    recipe = f"../{_safe_file_name(record.name)}.json"
    lines = [
        shlex.join(
            ["python", "-X", "utf8", "-c", _select_save_script(record), str(_relative_to_cwd(record_path)), recipe]
        )
    ]
    if record.git_commit is not None:
        lines.append(_checkout_command(record.git_commit))
    lines.append("pip install -c constraints.txt -e .")
    config = ["--config", recipe, f"output_dir={_rerun_output_dir(record)}"]
    engine = record.engine.name if record.engine else None
    processes = record.device.num_processes
    if engine is None and processes > 1:
        lines.append(f"# it ran in {processes} processes, by a launcher that the record does not name")
    if engine in {None, "single"}:
        return [*lines, shlex.join(["python", "launch/train.py", *config])]
    file = "cpu2" if record.device.type == "cpu" and engine == "ddp" else engine
    launcher = ["accelerate", "launch", "--config_file", f"accel_configs/{file}.yaml"]
    return [*lines, shlex.join([*launcher, "--num_processes", str(processes), "launch/train.py", *config])]


def _checkout_command(git_commit: str) -> str:
    """The line that checks out a record's commit. A record may come from anyone: what is no commit may be an option."""
    commit, *changed = git_commit.split("+")
    if not re.fullmatch(r"[0-9a-f]{4,64}", commit):
        return "# its commit is not known"
    return f"git checkout {commit}" + ("  # and it had changes that no commit has" if changed else "")


def _select_save_script(record: RunRecord) -> str:
    """Python that saves the recipe of a record, its first argument, as JSON, which every commit reads as YAML."""
    if any(INTERPOLATION_PREFIX in text for text in _iter_strings(record.recipe)):
        return _SAVE_ESCAPED_RECIPE_SCRIPT
    return _SAVE_RECIPE_SCRIPT


def _iter_strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for item in value.values() for text in _iter_strings(item))
    elif isinstance(value, (list, tuple)):
        yield from (text for item in value for text in _iter_strings(item))


def _safe_file_name(name: str) -> str:
    """A run's name as that of a file, with nothing that a shell or a file system reads as more."""
    return re.sub(r"[^\w.=,+-]+", "_", name, flags=re.ASCII).lstrip(".-")[:_MAX_FILE_NAME_CHARS] or "recipe"


def _relative_to_cwd(path: Path) -> Path:
    """A path below the current directory as seen from there, so that a page that is shared tells less of a machine."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _rerun_output_dir(record: RunRecord) -> str:
    """Where the run goes when repeated, as YAML that is read as this text."""
    folder = f"{_relative_to_cwd(Path(str(record.recipe.get('output_dir', 'runs'))))}_again"
    if re.fullmatch(r"[\w./=+-]+", folder, flags=re.ASCII):
        return folder
    return json.dumps(escape_interpolation(folder), ensure_ascii=False)
