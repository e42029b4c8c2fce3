"""Configurations: the runs that differ in nothing but their seeds, and what they come to together."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peftbench.record import RunRecord, train_peak_bytes
from peftbench.report.columns import labelled

SEEDS = ("train.seed", "data.seed")
_NAMES = ("name", "output_dir")


@dataclass(frozen=True, eq=False)
class Configuration:
    """Runs of one recipe, with other seeds. Equal only to itself, so that it can be a key."""

    label: str
    """What the runs' names share, on one line, and the method where that does not say it; no two have the same."""
    kind: str
    """Of the method."""
    runs: tuple[RunRecord, ...]

    @property
    def ok(self) -> tuple[RunRecord, ...]:
        """The runs that ended well: figures are of these."""
        return tuple(run for run in self.runs if run.outcome.kind == "ok")

    @property
    def trains(self) -> bool:
        """Whether a run that ended well changed a parameter; of a baseline none does, and no seed matters to it."""
        return any(run.parameters is not None and run.parameters.trainable > 0 for run in self.ok)

    @property
    def peak_bytes(self) -> float | None:
        """Mean peak of the training phase; None where a run's is not known."""
        return _mean(train_peak_bytes(run) for run in self.ok)

    @property
    def peak_range(self) -> tuple[int, int] | None:
        """The least and the greatest peak of the runs' training phases, in bytes; None where one is not known."""
        known = [peak for run in self.ok if (peak := train_peak_bytes(run)) is not None]
        return (min(known), max(known)) if known and len(known) == len(self.ok) else None

    @property
    def train_seconds(self) -> float | None:
        """Mean seconds of the training phase; None where a run's are not known."""
        return _mean(run.train_seconds for run in self.ok)

    @property
    def step_seconds(self) -> tuple[float, float] | None:
        """The least tenth and the greatest ninetieth percentile of the runs' step seconds; None where not known."""
        speeds = [run.throughput for run in self.ok if run.throughput is not None]
        if not speeds or len(speeds) < len(self.ok):
            return None
        return min(s.step_seconds_p10 for s in speeds), max(s.step_seconds_p90 for s in speeds)

    @property
    def required_flops(self) -> float | None:
        """Mean of the FLOPs that all steps needed; None where a run's are not known."""
        return _mean(run.flops.required for run in self.ok)

    @property
    def losses(self) -> tuple[float, ...]:
        """Held-out losses in nats, of the runs that have one that is a number."""
        found = (run.quality.loss for run in self.ok if run.quality is not None)
        return tuple(loss for loss in found if loss is not None and math.isfinite(loss))

    @property
    def rouge_l(self) -> tuple[float, ...]:
        """ROUGE-L (0 to 100) of generated summaries, of the runs that wrote some."""
        found = (run.quality.rouge for run in self.ok if run.quality is not None)
        return tuple(rouge["rougeL"].mean for rouge in found if rouge and "rougeL" in rouge)


def configurations(records: Sequence[RunRecord]) -> list[Configuration]:
    """The configurations of ``records``, in the order in which their first runs come."""
    found = [_configuration(runs) for runs in alike(records, SEEDS)]
    seen: Counter[str] = Counter()
    for index, one in enumerate(found):
        seen[one.label] += 1
        if seen[one.label] > 1:  # two suites in one folder may have runs of one name
            found[index] = replace(one, label=f"{one.label} #{seen[one.label]}")
    return found


def alike(records: Sequence[RunRecord], knobs: Sequence[str]) -> list[list[RunRecord]]:
    """Groups of records whose recipes differ in nothing but their names and ``knobs``, in the order they first come."""
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        groups.setdefault(_without(record.recipe, (*_NAMES, *knobs)), []).append(record)
    return list(groups.values())


def _without(recipe: dict[str, Any], knobs: Sequence[str]) -> str:
    """JSON of a recipe, with null for ``knobs``."""
    left = dict(recipe)
    for knob in knobs:
        *parents, last = knob.split(".")
        place = left
        for parent in parents:
            place[parent] = dict(place[parent])  # the recipe itself stays as it is
            place = place[parent]
        place[last] = None
    return json.dumps(left, sort_keys=True)


def _configuration(runs: Sequence[RunRecord]) -> Configuration:
    kind = str(runs[0].recipe["method"]["kind"])
    return Configuration(labelled(_shared([on_a_line(run.name) for run in runs]) or kind, kind), kind, tuple(runs))


def on_a_line(text: str) -> str:
    """Text without anything that is not printed, and with single spaces."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _shared(names: Sequence[str]) -> str:
    """What names share: of ``lora-seed=0`` and ``lora-seed=1`` it is ``lora``."""
    words = [name.split("-") for name in names]
    if len({len(one) for one in words}) == 1:
        same = "-".join(places[0] for places in zip(*words, strict=True) if len(set(places)) == 1)
        if same:
            return same
    beginning = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in beginning).rstrip("-_=. ")


def _mean(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if not known or None in known else statistics.fmean(value for value in known if value is not None)
