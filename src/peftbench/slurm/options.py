"""Options of sbatch(1): which there are, and which of them peftbench sets itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from peftbench.errors import SlurmError, TimeLimitError, did_you_mean

STOP_SIGNAL_FORMAT, DEFAULT_LEAD_SECONDS = "B:USR1@{}", 120
"""What SLURM is to send a job's script before its time is up, and how long before."""

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
"""Those that stand alone; some of them take a value too."""
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
    "array": "one task a run; --at-once says how many run together",
    "nodes": "give --nodes",
    "gpus-per-node": "give --gpus-per-node",
    "ntasks": "there is one on each node",
    "ntasks-per-node": "there is one on each node",
    "ntasks-per-gpu": "there is one on each node",
    "ntasks-per-core": "there is one on each node",
    "ntasks-per-socket": "there is one on each node",
    "requeue": "jobs are, or give slurm.no-requeue=true",
    "open-mode": "a log is gone on with",
    "chdir": "jobs run where they were submitted",
    "input": "nothing is read",
    "wrap": "the script is written",
    "output": "logs lie in slurm/ below the runs' folder",
    "wait": "follow it with peftbench status",
    "test-only": "give --dry-run",
    "parsable": "it is read here",
    "quiet": "what is said is short",
    "verbose": "hand in the script that --dry-run writes",
    "ignore-pbs": "there is nothing of PBS in the script",
}
"""Those that are set already, and how."""
ALLOWED_OPTIONS = tuple(sorted(_FLAG_OPTIONS | _VALUE_OPTIONS))
"""All that may be given."""

_TIME_PATTERN = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")
_STOP_SIGNAL_PATTERN = re.compile(r"B:(?:SIG)?USR1@(\d+)")


def parse_sbatch_options(options: Mapping[str, Any]) -> dict[str, str | None]:
    """Options by name, as sbatch spells them, each with its value, or None where it stands alone.

    ``given`` has them by name, with dashes or underscores; false and null leave one out.

    Raises:
        SlurmError: there is no such option, or it is not for a user to set, or its value cannot be meant.
    """
    found: dict[str, str | None] = {}
    for key, value in options.items():
        name = str(key).replace("_", "-")
        if name in _RESERVED_OPTIONS:
            raise SlurmError(f"slurm.{key} is set by peftbench itself: {_RESERVED_OPTIONS[name]}")
        if name not in ALLOWED_OPTIONS:
            hint = did_you_mean(name, ALLOWED_OPTIONS)
            raise SlurmError(f"sbatch has no option {name!r} that can be given as slurm.{key}", hint)
        if value is None or value is False:
            continue
        found[name] = _format_value(name, value)
    return found


def _format_value(name: str, value: object) -> str | None:
    if value is True:
        if name not in _FLAG_OPTIONS:
            raise SlurmError(f"slurm.{name}=true says nothing; sbatch's --{name} wants a value")
        return None
    if not isinstance(value, (str, int, float)):
        raise SlurmError(f"slurm.{name} must be a text or a number, not {value!r}")
    text = str(value)
    if any(ord(character) < ord(" ") for character in text):
        raise SlurmError(f"slurm.{name}={text!r} has a character that no option can hold")
    return text


def parse_lead_seconds(options: Mapping[str, str | None]) -> int:
    """How long before the end of its time a job is told.

    Raises:
        SlurmError: it would be told in another way than the one that its script hears.
    """
    given = options.get("signal")
    if given is None:
        return DEFAULT_LEAD_SECONDS
    if (found := _STOP_SIGNAL_PATTERN.fullmatch(given)) is None:
        raise SlurmError(
            f"slurm.signal={given!r} is not what a job's script hears; give B:USR1@SECONDS, as {STOP_SIGNAL_FORMAT.format(300)}"
        )
    return int(found[1])


def parse_time_limit(time: str) -> int | None:
    """Seconds of a time as sbatch takes it (minutes, minutes:seconds, hours:minutes:seconds, days-...), None if none.

    Raises:
        SlurmError: it is no time.
    """
    if time.lower() in {"infinite", "unlimited", "0"}:
        return None
    if (found := _TIME_PATTERN.fullmatch(time)) is None:
        raise SlurmError(f"slurm.time={time!r} is no time; give minutes, hours:minutes:seconds or days-hours")
    parts = [int(part) for part in found["parts"].split(":")]
    if found["days"] is not None:  # days-hours[:minutes[:seconds]]
        hours, minutes, seconds = (*parts, 0, 0)[:3]
        return ((int(found["days"]) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, (*parts, 0)[:2]
    return (hours * 60 + minutes) * 60 + seconds


def check_time_limit(options: Mapping[str, str | None]) -> None:
    """Whether the time leaves some before the signal.

    Raises:
        TimeLimitError: the job would be told to stop before it began.
    """
    time, lead = options.get("time"), parse_lead_seconds(options)
    seconds = None if time is None else parse_time_limit(time)
    if seconds is not None and seconds <= lead:
        raise TimeLimitError(
            f"slurm.time={time} is {seconds} s, and the job is told to stop {lead} s before its end, so that no step "
            f"could be trained; give more, or a later signal as slurm.signal={STOP_SIGNAL_FORMAT.format(max(1, seconds // 4))}"
        )
