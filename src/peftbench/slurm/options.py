"""Options of sbatch(1): the known ones, and those that peftbench sets itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from peftbench.errors import SlurmError, TimeLimitError, did_you_mean

STOP_SIGNAL_FORMAT, DEFAULT_LEAD_SECONDS = "B:USR1@{}", 120
"""The signal that SLURM sends to the batch script before the time limit, and the seconds before the limit."""

_FLAG_OPTIONS = frozenset(
    {
        "contiguous",
        "exclusive",
        "get-user-env",
        "hold",
        "nice",
        "no-kill",
        "no-requeue",
        "oom-kill-step",
        "overcommit",
        "oversubscribe",
        "propagate",
        "reboot",
        "spread-job",
        "stepmgr",
        "use-min-nodes",
    }
)
"""Options that need no value; some take one."""
_VALUE_OPTIONS = frozenset(
    {
        "account",
        "acctg-freq",
        "batch",
        "bb",
        "bbf",
        "begin",
        "cluster-constraint",
        "clusters",
        "comment",
        "constraint",
        "container",
        "container-id",
        "core-spec",
        "cores-per-socket",
        "cpu-freq",
        "cpus-per-gpu",
        "cpus-per-task",
        "deadline",
        "delay-boot",
        "dependency",
        "distribution",
        "error",
        "exclude",
        "export",
        "export-file",
        "extra",
        "extra-node-info",
        "gid",
        "gpu-bind",
        "gpu-freq",
        "gpus",
        "gpus-per-node",
        "gpus-per-socket",
        "gpus-per-task",
        "gres",
        "gres-flags",
        "hint",
        "job-name",
        "kill-on-invalid-dep",
        "licenses",
        "mail-type",
        "mail-user",
        "mcs-label",
        "mem",
        "mem-bind",
        "mem-per-cpu",
        "mem-per-gpu",
        "mincpus",
        "network",
        "nodefile",
        "nodelist",
        "partition",
        "power",
        "prefer",
        "priority",
        "profile",
        "qos",
        "reservation",
        "resv-ports",
        "segment",
        "signal",
        "sockets-per-node",
        "switches",
        "thread-spec",
        "threads-per-core",
        "time",
        "time-min",
        "tmp",
        "tres-bind",
        "tres-per-task",
        "uid",
        "wait-all-nodes",
        "wckey",
    }
)
_RESERVED_OPTIONS = {
    "array": "the array has one task per run; --max-parallel limits concurrent tasks",
    "nodes": "give --nodes",
    "ntasks": "each node has one task",
    "ntasks-per-node": "each node has one task",
    "ntasks-per-gpu": "each node has one task",
    "ntasks-per-core": "each node has one task",
    "ntasks-per-socket": "each node has one task",
    "requeue": "jobs are requeued; slurm.no-requeue=true turns that off",
    "open-mode": "logs are appended to",
    "chdir": "jobs run in the folder of the submission",
    "input": "jobs read no input",
    "wrap": "peftbench writes the script",
    "output": "logs are in slurm/ in the output folder",
    "wait": "follow the job with peftbench status",
    "test-only": "give --dry-run",
    "parsable": "peftbench reads the job id",
    "quiet": "the output is already short",
    "verbose": "submit the script of --dry-run by hand",
    "ignore-pbs": "the script has no PBS directives",
}
"""Options that peftbench sets, and how."""
ALLOWED_OPTIONS = tuple(sorted(_FLAG_OPTIONS | _VALUE_OPTIONS))
"""All options that a user may set."""

PROLOGUE_KEY = "prologue"
"""Not an option of sbatch: commands of the batch script before the run."""

_TIME_PATTERN = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")
_STOP_SIGNAL_PATTERN = re.compile(r"B:(?:SIG)?USR1@(\d+)")


def parse_sbatch_options(options: Mapping[str, Any]) -> dict[str, str | None]:
    """Return options under sbatch's names with their values; the value None marks a flag.

    Names in ``options`` may have dashes or underscores. The values false and null leave an option out.

    Raises:
        SlurmError: an unknown option, one that peftbench sets itself, or an invalid value.
    """
    parsed: dict[str, str | None] = {}
    for key, value in options.items():
        name = str(key).replace("_", "-")
        if name in _RESERVED_OPTIONS:
            raise SlurmError(f"slurm.{key} is set by peftbench itself: {_RESERVED_OPTIONS[name]}")
        if name not in ALLOWED_OPTIONS:
            hint = did_you_mean(name, ALLOWED_OPTIONS)
            raise SlurmError(f"unknown sbatch option {name!r} in slurm.{key}", hint)
        if value is None or value is False:
            continue
        parsed[name] = _format_value(name, value)
    return parsed


def parse_prologue(value: object) -> tuple[str, ...]:
    """Return the commands that a job executes before its run; ``value`` is one or several lines, or a list of commands.

    Raises:
        SlurmError: ``value`` is something else, or a command has a control character.
    """
    given = value if isinstance(value, (list, tuple)) else [] if value is None or value is False else [value]
    commands = [command for command in given if isinstance(command, str)]
    if len(commands) != len(given):
        raise SlurmError(f"slurm.{PROLOGUE_KEY} must be a command or a list of commands, not {value!r}")
    for command in commands:
        if any(ord(character) < ord(" ") and character not in "\n\t" for character in command):
            raise SlurmError(f"slurm.{PROLOGUE_KEY}: {command!r} has a control character")
    return tuple(command.strip("\n") for command in commands if command.strip())


def _format_value(name: str, value: object) -> str | None:
    if value is True:
        if name not in _FLAG_OPTIONS:
            raise SlurmError(f"slurm.{name}=true is invalid; sbatch's --{name} needs a value")
        return None
    if not isinstance(value, (str, int, float)):
        raise SlurmError(f"slurm.{name} must be a string or a number, not {value!r}")
    text = str(value)
    if any(ord(character) < ord(" ") for character in text):
        raise SlurmError(f"slurm.{name}={text!r} has a control character")
    return text


def parse_lead_seconds(options: Mapping[str, str | None]) -> int:
    """Return the seconds between a job's stop request and its time limit.

    Raises:
        SlurmError: a signal that the batch script does not handle.
    """
    stop_signal = options.get("signal")
    if stop_signal is None:
        return DEFAULT_LEAD_SECONDS
    if (match := _STOP_SIGNAL_PATTERN.fullmatch(stop_signal)) is None:
        raise SlurmError(
            f"the batch script does not handle slurm.signal={stop_signal!r}; give B:USR1@SECONDS, e.g. "
            f"{STOP_SIGNAL_FORMAT.format(300)}"
        )
    return int(match[1])


def parse_time_limit(time: str) -> int | None:
    """Return the seconds of sbatch's --time (minutes, minutes:seconds, hours:minutes:seconds, days-...).

    Returns None for an unlimited time.

    Raises:
        SlurmError: an invalid time.
    """
    if time.lower() in {"infinite", "unlimited", "0"}:
        return None
    if (match := _TIME_PATTERN.fullmatch(time)) is None:
        raise SlurmError(f"slurm.time={time!r} is not a valid time; give minutes, hours:minutes:seconds or days-hours")
    parts = [int(part) for part in match["parts"].split(":")]
    if match["days"] is not None:  # days-hours[:minutes[:seconds]]
        hours, minutes, seconds = (*parts, 0, 0)[:3]
        return ((int(match["days"]) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, (*parts, 0)[:2]
    return (hours * 60 + minutes) * 60 + seconds


def check_time_limit(options: Mapping[str, str | None]) -> None:
    """Check that the time limit is longer than the lead time of the stop signal.

    Raises:
        TimeLimitError: the stop request would come before the job's start.
    """
    time, lead = options.get("time"), parse_lead_seconds(options)
    seconds = None if time is None else parse_time_limit(time)
    if seconds is not None and seconds <= lead:
        raise TimeLimitError(
            f"slurm.time={time} is {seconds} s, but the job is stopped {lead} s before its time limit; give a longer "
            f"time, or a later signal, e.g. slurm.signal={STOP_SIGNAL_FORMAT.format(max(1, seconds // 4))}"
        )
