"""The line of a run that trains, for known figures on a clock that only the test moves."""

from __future__ import annotations

import io
import sys

import pytest

from peftbench.run.progress_bar import ProgressBar, format_metrics, shorten_name

MIB = 2**20


class Stream(io.StringIO):
    """A stream that is a terminal, or is none."""

    encoding = "utf-8"

    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as the line and tqdm ask for it."""
    now = [100.0]
    monkeypatch.setattr("peftbench.run.progress_bar.time.monotonic", lambda: now[0])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def test_the_line_s_text(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Gone on with after 10 of 20 steps, two seconds each: real tokens of the last steps, time left at this pace."""
    monkeypatch.setattr(sys, "stderr", stream := Stream(terminal=True))
    with ProgressBar(
        "lora-r=8", 10, 20, read_memory_bytes=lambda: 96 * MIB, budget_bytes=112 * MIB, enabled=True
    ) as line:
        for step in range(11, 16):
            clock[0] += 2
            line.update(loss=step / 8, real_tokens=20_000 + 1_000 * step)
    shown = stream.getvalue()
    first, *later = [text.rstrip() for text in shown.split("\r") if text.strip()]
    assert first == "lora-r=8 |█████     | 10/20, ? left"
    assert later[0] == "lora-r=8 |█████▌    | 11/20, loss 1.375, 15,500 tokens/s, 96 of 112 MiB, 00:18 left"
    assert later[-1] == "lora-r=8 |███████▌  | 15/20, loss 1.875, 16,500 tokens/s, 96 of 112 MiB, 00:10 left"
    assert shown.count("\n") == 1
    assert shown.endswith("\n")


def test_tokens_per_second_are_of_the_last_steps(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow start is forgotten after twenty steps."""
    monkeypatch.setattr(sys, "stderr", stream := Stream(terminal=True))
    with ProgressBar("x", 0, 99, read_memory_bytes=lambda: None, budget_bytes=None, enabled=True) as line:
        for seconds in (1000, *[0.5] * 19):
            clock[0] += seconds
            line.update(loss=1.0, real_tokens=100)
        assert ", 2 tokens/s," in stream.getvalue().split("\r")[-1]
        clock[0] += 0.5
        line.update(loss=1.0, real_tokens=100)
    assert ", 200 tokens/s, memory unknown," in stream.getvalue().split("\r")[-1]


@pytest.mark.parametrize(("terminal", "shown"), [(False, True), (True, False)])
def test_nothing_is_written_where_nobody_looks(terminal: bool, shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is memory asked for: standard error is a file, or another rank has the line."""
    monkeypatch.setattr(sys, "stderr", stream := Stream(terminal=terminal))
    asked: list[int] = []

    def memory() -> int:
        asked.append(1)
        return MIB

    with ProgressBar("x", 0, 2, read_memory_bytes=memory, budget_bytes=None, enabled=shown) as line:
        line.update(loss=1.0, real_tokens=5)
        line.update(loss=1.0, real_tokens=5)
    assert (stream.getvalue(), asked) == ("", [])


def test_figures() -> None:
    """Memory stands alone where there is no budget, and is called unknown where nothing tells it."""
    assert format_metrics(2.3144, 18_203.9, 96 * MIB, 112 * MIB) == "loss 2.314, 18,204 tokens/s, 96 of 112 MiB"
    assert format_metrics(12.5, 0.4, 96 * MIB, None) == "loss 12.500, 0 tokens/s, 96 MiB"
    assert format_metrics(1, 2, None, 112 * MIB) == "loss 1.000, 2 tokens/s, memory unknown"


def test_long_names_keep_their_end() -> None:
    """It tells the runs of a suite apart; however narrow the terminal, some of it is there."""
    assert shorten_name("lora-r=8", 12) == "lora-r=8"
    assert shorten_name("adamw8bit-path=openai-community_gpt2-large", 16) == "…nity_gpt2-large"
    assert shorten_name("adamw8bit-path=openai-community_gpt2-large", -9) == "…_gpt2-large"
