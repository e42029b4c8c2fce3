"""The progress bar's text, for known values and a clock that only the test advances."""

from __future__ import annotations

import io
import sys

import pytest

from peftbench.record import HeldOutCurve, HeldOutPoint
from peftbench.run.progress_bar import ProgressBar, format_metrics, shorten_name
from peftbench.training.callbacks import StepInfo

MIB = 2**20


class Stream(io.StringIO):
    """A stream that is a terminal or not."""

    encoding = "utf-8"

    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list with the time that the bar and tqdm read."""
    now = [100.0]
    monkeypatch.setattr("peftbench.run.progress_bar.time.monotonic", lambda: now[0])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def info(step: int, loss: float, real_tokens: int) -> StepInfo:
    """Return the results of one of 20 steps."""
    return StepInfo(step=step, total_steps=20, loss=loss, learning_rate=1e-3, real_tokens=real_tokens)


def test_text_of_a_resumed_training(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Resumed after 10 of 20 steps, two seconds each: tokens per second and time left are those of the new steps."""
    monkeypatch.setattr(sys, "stderr", stream := Stream(terminal=True))
    with ProgressBar(
        "lora-r=8", 10, 20, read_memory_bytes=lambda: 96 * MIB, budget_bytes=112 * MIB, enabled=True
    ) as bar:
        for step in range(11, 16):
            clock[0] += 2
            bar.after_step(info(step, loss=step / 8, real_tokens=20_000 + 1_000 * step))
    output = stream.getvalue()
    first, *later = [text.rstrip() for text in output.split("\r") if text.strip()]
    assert first == "lora-r=8 |█████     | 10/20, ? left"
    assert later[0] == "lora-r=8 |█████▌    | 11/20, loss 1.375, 15,500 tokens/s, 96 of 112 MiB, 00:18 left"
    assert later[-1] == "lora-r=8 |███████▌  | 15/20, loss 1.875, 16,500 tokens/s, 96 of 112 MiB, 00:10 left"
    assert output.count("\n") == 1
    assert output.endswith("\n")


def test_tokens_per_second_average_over_last_twenty_steps(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow first step no longer counts after twenty more steps."""
    monkeypatch.setattr(sys, "stderr", stream := Stream(terminal=True))
    with ProgressBar("x", 0, 99, read_memory_bytes=lambda: None, budget_bytes=None, enabled=True) as bar:
        for seconds in (1000, *[0.5] * 19):
            clock[0] += seconds
            bar.after_step(info(1, loss=1.0, real_tokens=100))
        assert ", 2 tokens/s," in stream.getvalue().split("\r")[-1]
        clock[0] += 0.5
        bar.after_step(info(1, loss=1.0, real_tokens=100))
    assert ", 200 tokens/s, memory unknown," in stream.getvalue().split("\r")[-1]


@pytest.mark.parametrize(("terminal", "enabled"), [(False, True), (True, False)])
def test_disabled_bar_writes_nothing(terminal: bool, enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a terminal, or on another rank, nothing is written and no memory is read."""
    monkeypatch.setattr(sys, "stderr", stream := Stream(terminal=terminal))

    def read_memory_bytes() -> int:
        pytest.fail("memory was read")

    with ProgressBar("x", 0, 2, read_memory_bytes=read_memory_bytes, budget_bytes=None, enabled=enabled) as bar:
        bar.after_step(info(1, loss=1.0, real_tokens=5))
        bar.after_step(info(2, loss=1.0, real_tokens=5))
    assert stream.getvalue() == ""


def test_format_metrics_with_and_without_budget() -> None:
    """Without a budget the text has only the memory in use; memory that cannot be read is unknown."""
    assert format_metrics(2.3144, 18_203.9, 96 * MIB, 112 * MIB) == "loss 2.314, 18,204 tokens/s, 96 of 112 MiB"
    assert format_metrics(12.5, 0.4, 96 * MIB, None) == "loss 12.500, 0 tokens/s, 96 MiB"
    assert format_metrics(1, 2, None, 112 * MIB) == "loss 1.000, 2 tokens/s, memory unknown"


def test_evaluation_is_shown_and_is_in_no_rate(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """After an evaluation of a minute the bar shows its loss and the tokens per second of the steps."""
    monkeypatch.setattr(sys, "stderr", stream := Stream(terminal=True))
    point = HeldOutPoint(step=1, loss=2.5, seconds=60)
    with ProgressBar("a", 0, 20, read_memory_bytes=lambda: None, budget_bytes=None, enabled=True) as bar:
        for step in (1, 2):
            clock[0] += 2
            bar.after_step(info(step, loss=3, real_tokens=1_000))
            if step == 1:
                clock[0] += point.seconds
                bar.after_evaluation(HeldOutCurve(split="validation", num_examples=1, points=(point,)))
    first, *_, last = [text for text in stream.getvalue().split("\r") if "tokens/s" in text]
    assert "loss 3.000, 500 tokens/s" in first
    assert "loss 3.000, held-out 2.500, 500 tokens/s" in last


def test_long_names_keep_their_end() -> None:
    """Runs of a suite differ at the end of their names; at least 12 columns of it remain on a narrow terminal."""
    assert shorten_name("lora-r=8", 12) == "lora-r=8"
    assert shorten_name("adamw8bit-path=openai-community_gpt2-large", 16) == "…nity_gpt2-large"
    assert shorten_name("adamw8bit-path=openai-community_gpt2-large", -9) == "…_gpt2-large"
