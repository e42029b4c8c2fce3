"""Shell commands that repeat a run."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from peftbench.common.text import INTERPOLATION_PREFIX, escape_interpolation
from peftbench.record import RECORD_FILE, RunRecord

_MAX_FILE_NAME_CHARS = 100
"""Maximum length of the recipe's file name."""

_SAVE_RECIPE_SCRIPT = (
    'import json,sys; json.dump(json.load(open(sys.argv[1]))["recipe"], open(sys.argv[2], "x"), ensure_ascii=False)'
)

# OmegaConf would resolve a "${" that the recipe holds as text. Backslashes before it escape it, doubled again in JSON.
_SAVE_ESCAPED_RECIPE_SCRIPT = (
    r'import json,re,sys; open(sys.argv[2], "x").write(re.sub(r"(\\*)[$][{]", r"\1\1\\\\${", '
    r'json.dumps(json.load(open(sys.argv[1]))["recipe"], ensure_ascii=False)))'
)


def reproduce_commands(record: RunRecord, record_path: Path) -> list[str]:
    """Return the commands that repeat a run from its record, to be run in a checkout of peftbench.

    The recipe is saved outside the checkout first, because the run's commit may lack the record, or may not be able to
    read a recipe from it. An existing file is not overwritten.
    """
    recipe = f"../{_safe_file_name(record.name)}.json"
    script, source = _select_save_script(record), str(_relative_to_cwd(record_path))
    lines = [shlex.join(["python", "-X", "utf8", "-c", script, source, recipe])]
    if record.git_commit is not None:
        lines.append(build_checkout_command(record.git_commit))
    lines.append("pip install -c constraints.txt -e .")
    return [*lines, *build_launch_commands(record, ["--config", recipe, f"output_dir={_rerun_output_dir(record)}"])]


def build_launch_commands(record: RunRecord, arguments: Sequence[str]) -> list[str]:
    """Return the command that trains with the run's engine and number of processes, for a checkout of peftbench.

    ``arguments`` name the recipe. A comment comes first if the record does not name the launcher.
    """
    engine = record.engine.name if record.engine else None
    processes = record.device.num_processes
    lines = []
    if engine is None and processes > 1:
        lines.append(f"# the run used {processes} processes; the record does not name the launcher")
    if engine in {None, "single"}:
        return [*lines, shlex.join(["python", "launch/train.py", *arguments])]
    config_file = "cpu2" if record.device.type == "cpu" and engine == "ddp" else engine
    launcher = ["accelerate", "launch", "--config_file", f"accel_configs/{config_file}.yaml"]
    return [*lines, shlex.join([*launcher, "--num_processes", str(processes), "launch/train.py", *arguments])]


def build_fitting_command(record: RunRecord) -> str | None:
    """Return the command that repeats a run with the settings that are predicted to fit; None if there are none.

    A trained model whose evaluation ran out of memory is evaluated again, not trained.
    """
    outcome = record.outcome
    if not outcome.suggested_overrides:
        return None
    folder = _relative_to_cwd(Path(str(record.recipe.get("output_dir", "runs")))) / record.name
    is_saved = record.tokens is not None and record.recipe.get("save_model", True)
    is_evaluation = is_saved and all(override.startswith("evaluate.") for override in outcome.suggested_overrides)
    target = ["evaluate", str(folder)] if is_evaluation else ["train", str(folder / RECORD_FILE)]
    return shlex.join(["peftbench", *target, *outcome.suggested_overrides])


def build_checkout_command(git_commit: str) -> str:
    """Return the checkout command. A record may come from anyone, so only a hexadecimal hash is accepted."""
    commit, *changes = git_commit.split("+")
    if not re.fullmatch(r"[0-9a-f]{4,64}", commit):
        return "# the commit of the run is unknown"
    return f"git checkout {commit}" + ("  # plus uncommitted changes" if changes else "")


def _select_save_script(record: RunRecord) -> str:
    """Return Python code that saves the recipe of a record as JSON, which every commit can read as YAML."""
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
    """Return the run's name as a file name without characters special to a shell or a file system."""
    return re.sub(r"[^\w.=,+-]+", "_", name, flags=re.ASCII).lstrip(".-")[:_MAX_FILE_NAME_CHARS] or "recipe"


def _relative_to_cwd(path: Path) -> Path:
    """Make a path below the current directory relative, so that a shared page does not reveal the machine's folders."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _rerun_output_dir(record: RunRecord) -> str:
    """Return the output folder of the repeated run, quoted so that YAML reads it as a string."""
    folder = f"{_relative_to_cwd(Path(str(record.recipe.get('output_dir', 'runs'))))}_again"
    if re.fullmatch(r"[\w./=+-]+", folder, flags=re.ASCII):
        return folder
    return json.dumps(escape_interpolation(folder), ensure_ascii=False)
