"""What sbatch may be told, and what it is told."""

from __future__ import annotations

from typing import Any

import pytest

from peftbench.errors import SlurmError, TimeLimitError
from peftbench.slurm.options import (
    ALLOWED_OPTIONS,
    DEFAULT_LEAD_SECONDS,
    check_time_limit,
    parse_lead_seconds,
    parse_sbatch_options,
    parse_time_limit,
)


def test_options_as_sbatch_spells_them() -> None:
    """Underscores are dashes, switches stand alone, and what is false or null is left out."""
    given: dict[str, Any] = {
        "partition": "gpu",
        "cpus_per_task": 4,
        "exclusive": True,
        "hold": False,
        "qos": None,
        "time": "1:00:00",
    }
    assert parse_sbatch_options(given) == {
        "partition": "gpu",
        "cpus-per-task": "4",
        "exclusive": None,
        "time": "1:00:00",
    }
    assert len(ALLOWED_OPTIONS) > 80


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"partion": "gpu"},
            "sbatch has no option 'partion' that can be given as slurm.partion; did you mean 'partition'",
        ),
        ({"array": "0-3"}, "slurm.array is set by peftbench itself: one task a run; --at-once says how many"),
        ({"nodes": 2}, "slurm.nodes is set by peftbench itself: give --nodes"),
        ({"partition": True}, "slurm.partition=true says nothing; sbatch's --partition wants a value"),
        ({"partition": ["a", "b"]}, "slurm.partition must be a text or a number, not ['a', 'b']"),
        ({"comment": "a\n#SBATCH --uid=0"}, "has a character that no option can hold"),
    ],
)
def test_what_cannot_be_meant(given: dict[str, Any], said: str) -> None:
    """Each is refused in one line, an unknown name with those that there are."""
    with pytest.raises(SlurmError) as caught:
        parse_sbatch_options(given)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    if "partion" in given:
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
def test_times_as_sbatch_takes_them(time: str, seconds: int | None) -> None:
    """Minutes alone, and then seconds, hours and days around them (sbatch(1), --time)."""
    assert parse_time_limit(time) == seconds


@pytest.mark.parametrize("time", ["soon", "1h", "1:2:3:4", "-5", "1-", ""])
def test_what_is_no_time(time: str) -> None:
    """It is refused."""
    with pytest.raises(SlurmError, match="is no time; give minutes"):
        parse_time_limit(time)


def test_a_time_must_leave_some() -> None:
    """A job that is told to stop before it can begin is refused; at one second more it is not."""
    check_time_limit({})
    check_time_limit({"time": f"0:{DEFAULT_LEAD_SECONDS + 1}"})
    with pytest.raises(TimeLimitError, match="is 120 s, and the job is told to stop 120 s before its end"):
        check_time_limit({"time": "2"})
    check_time_limit({"time": "2", "signal": "B:USR1@30"})
    assert parse_lead_seconds({"signal": "B:SIGUSR1@45"}) == 45
    with pytest.raises(SlurmError, match="is not what a job's script hears; give B:USR1@SECONDS"):
        parse_lead_seconds({"signal": "TERM@60"})
