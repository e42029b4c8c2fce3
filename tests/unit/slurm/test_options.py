"""sbatch options: names, values, times and signals."""

from __future__ import annotations

from typing import Any

import pytest

from peftbench.errors import SlurmError, TimeLimitError
from peftbench.slurm.options import (
    ALLOWED_OPTIONS,
    DEFAULT_LEAD_SECONDS,
    check_time_limit,
    parse_lead_seconds,
    parse_prologue,
    parse_sbatch_options,
    parse_time_limit,
)


def test_options_are_normalized() -> None:
    """Underscores become dashes, flags have no value, and false and null leave an option out."""
    options: dict[str, Any] = {
        "partition": "gpu",
        "cpus_per_task": 4,
        "exclusive": True,
        "hold": False,
        "qos": None,
        "time": "1:00:00",
    }
    assert parse_sbatch_options(options) == {
        "partition": "gpu",
        "cpus-per-task": "4",
        "exclusive": None,
        "time": "1:00:00",
    }
    assert len(ALLOWED_OPTIONS) > 80


@pytest.mark.parametrize(
    ("value", "commands"),
    [
        (None, ()),
        (False, ()),
        ("module load cuda", ("module load cuda",)),
        ("module load cuda\nconda activate x\n", ("module load cuda\nconda activate x",)),
        (["module load cuda", "", "conda activate x"], ("module load cuda", "conda activate x")),
    ],
)
def test_prologue_is_a_command_or_a_list(value: object, commands: tuple[str, ...]) -> None:
    """Empty commands are left out."""
    assert parse_prologue(value) == commands


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "must be a command or a list of commands"),
        ([1], "must be a command"),
        (["a\x07"], "has a control character"),
    ],
)
def test_invalid_prologue_is_refused(value: object, message: str) -> None:
    """The error names the key."""
    with pytest.raises(SlurmError, match=f"slurm.prologue:? .*{message}|slurm.prologue {message}"):
        parse_prologue(value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"partion": "gpu"},
            "unknown sbatch option 'partion' in slurm.partion; did you mean 'partition'",
        ),
        (
            {"array": "0-3"},
            "slurm.array is set by peftbench itself: the array has one task per run; --max-parallel limits",
        ),
        ({"nodes": 2}, "slurm.nodes is set by peftbench itself: give --nodes"),
        ({"partition": True}, "slurm.partition=true is invalid; sbatch's --partition needs a value"),
        ({"partition": ["a", "b"]}, "slurm.partition must be a string or a number, not ['a', 'b']"),
        ({"comment": "a\n#SBATCH --uid=0"}, "has a control character"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, Any], message: str) -> None:
    """The error has one line; for an unknown option it lists the allowed ones."""
    with pytest.raises(SlurmError) as caught:
        parse_sbatch_options(options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    if "partion" in options:
        assert all(name in str(caught.value) for name in ALLOWED_OPTIONS)


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("2:00:00", 7200),
        ("1-0", 86400),
        ("1-2:30", 95400),
        ("1-02:30:15", 95415),
        ("infinite", None),
        ("UNLIMITED", None),
        ("0", None),
    ],
)
def test_time_limit_accepts_every_sbatch_format(time: str, seconds: int | None) -> None:
    """The formats are those of --time in sbatch(1)."""
    assert parse_time_limit(time) == seconds


@pytest.mark.parametrize("time", ["soon", "1h", "1:2:3:4", "-5", "1-", ""])
def test_invalid_time_is_refused(time: str) -> None:
    """The message lists the formats."""
    with pytest.raises(SlurmError, match="is not a valid time; give minutes"):
        parse_time_limit(time)


def test_time_must_exceed_the_lead() -> None:
    """A time limit not longer than the lead of the stop signal is refused; one second more is enough."""
    check_time_limit({})
    check_time_limit({"time": f"0:{DEFAULT_LEAD_SECONDS + 1}"})
    with pytest.raises(TimeLimitError, match="is 120 s, but the job is stopped 120 s before its time limit"):
        check_time_limit({"time": "2"})
    check_time_limit({"time": "2", "signal": "B:USR1@30"})
    assert parse_lead_seconds({"signal": "B:SIGUSR1@45"}) == 45
    with pytest.raises(SlurmError, match=r"does not handle slurm\.signal='TERM@60'; give B:USR1@SECONDS"):
        parse_lead_seconds({"signal": "TERM@60"})
