"""Simulate suites with known differences, and count the suites whose intervals all contain them.

Run: python benchmarks/seed_coverage/simulation.py docs/results/demo_seeds
Examples are drawn from the records of a suite with several seeds, so their scores are distributed and correlated as
measured; seeds are drawn with a given variance. The intervals are computed by the report's functions.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
from numpy.typing import NDArray
from tabulate import tabulate

from peftbench.evaluation.intervals import paired_intervals
from peftbench.evaluation.seed_variance import pool_seed_variances, seed_error, widen_by_seeds
from peftbench.record import Interval, read_records
from peftbench.report.analysis.run_groups import group_runs
from peftbench.report.analysis.scores import collect_scores
from peftbench.report.analysis.significance import bonferroni_confidence
from peftbench.report.tables.table import insert_block

_Array = NDArray[numpy.float64]

METHOD_COUNTS = (2, 4)
SEED_COUNTS = (1, 2, 3, 5, 10)
HEAVY_TAILS = 4
"""Degrees of freedom of the t distribution of seeds with heavy tails."""


@dataclass(frozen=True)
class Population:
    """Scores of a suite's methods, split into the part that seeds share and the rest."""

    by_example: _Array
    """(methods, examples): mean over seeds, minus the method's mean."""
    residuals: _Array
    """(methods, seeds, examples): the rest, scaled to its unbiased variance."""
    example_variance: float
    """Squared standard error over examples of a difference with one seed, mean over pairs and seeds."""
    seed_variance: float
    """Variance over seeds of a difference for infinitely many examples, in units of ``example_variance``."""


@dataclass(frozen=True)
class Scenario:
    """Methods and seeds of one row of the table."""

    methods: int
    label: str
    ratio: float
    """Variance of a difference over seeds, in units of its variance over examples."""
    first_factor: float = 1.0
    """Factor of the first method's variance."""
    has_heavy_tails: bool = False


@dataclass(frozen=True)
class Coverage:
    """Result of one scenario with one number of seeds."""

    num_covered: int
    """Suites whose intervals all contain the true differences."""
    median_half_width: float


def read_population(folder: Path) -> Population:
    """Return the population of the ROUGE-L scores in ``folder``."""
    scores = collect_scores(group_runs(read_records(folder)))
    values = numpy.stack([numpy.stack(list(by_seed.values())) for by_seed in scores.by_group_and_seed.values()])
    _, seeds, examples = values.shape
    by_example, by_seed = values.mean(axis=1, keepdims=True), values.mean(axis=2, keepdims=True)
    means = values.mean(axis=(1, 2), keepdims=True)
    residuals = (values - by_example - by_seed + means) * numpy.sqrt(seeds / (seeds - 1))
    differences = [values[a] - values[b] for a, b in itertools.combinations(range(len(values)), 2)]
    example_variance = float(numpy.var(differences, axis=-1, ddof=1).mean()) / examples
    noise = float(numpy.var(residuals, axis=-1, ddof=1).mean()) / examples
    seed_variance = 2 * (float(numpy.var(by_seed, axis=1, ddof=1).mean()) - noise) / example_variance
    return Population((by_example - means)[:, 0], residuals, example_variance, max(seed_variance, 0.0))


def list_scenarios(population: Population, methods: int) -> list[Scenario]:
    """Return the scenarios, that of the records included."""
    measured = population.seed_variance
    return [
        Scenario(methods, "0", 0.0),
        Scenario(methods, f"{measured:.2g}, as in the records", measured),
        Scenario(methods, "4", 4.0),
        Scenario(methods, "16", 16.0),
        Scenario(methods, f"16, Student's t with {HEAVY_TAILS} degrees of freedom", 16.0, has_heavy_tails=True),
        Scenario(methods, "1; 25 for one method", 1.0, first_factor=25.0),
    ]


def draw_suites(
    population: Population, scenario: Scenario, seeds: int, suites: int, random: numpy.random.Generator
) -> _Array:
    """Return scores of shape (suites, methods, seeds, examples); all true means are zero."""
    methods, (known, runs, examples) = scenario.methods, population.residuals.shape
    order = random.permuted(numpy.tile(numpy.arange(known), (suites, 1)), axis=1)[:, :methods]
    example = random.integers(examples, size=(suites, examples))
    run = random.integers(runs, size=(suites, methods, seeds, examples))
    scores: _Array = population.residuals[order[:, :, None, None], run, example[:, None, None, :]]
    scores += population.by_example[order[:, :, None], example[:, None, :]][:, :, None, :]
    shape = (suites, methods, seeds)
    if scenario.has_heavy_tails:
        effects = random.standard_t(HEAVY_TAILS, shape) * numpy.sqrt((HEAVY_TAILS - 2) / HEAVY_TAILS)
    else:
        effects = random.normal(size=shape)
    effects *= numpy.sqrt(scenario.ratio * population.example_variance / 2)
    effects[:, 0] *= numpy.sqrt(scenario.first_factor)
    scores += effects[..., None]
    return scores


def compute_intervals(scores: _Array) -> Iterator[list[Interval]]:
    """Yield the intervals of all pairs of each suite of ``scores``, in the order of itertools.combinations."""
    suites, methods, seeds, examples = scores.shape
    pairs = list(itertools.combinations(range(methods), 2))
    confidence, averaged = bonferroni_confidence(len(pairs)), scores.mean(axis=2)
    differences = numpy.stack([averaged[:, a] - averaged[:, b] for a, b in pairs], axis=1)
    over_examples = paired_intervals(differences.reshape(-1, examples), confidence=confidence)
    means = scores.mean(axis=3)
    for suite in range(suites):
        intervals = over_examples[suite * len(pairs) : (suite + 1) * len(pairs)]
        if seeds == 1:
            yield intervals
            continue
        variances = [float(one) for one in means[suite].var(axis=1, ddof=1)]
        pooled = pool_seed_variances(variances, [seeds] * methods)
        yield [
            widen_by_seeds(interval, seed_error([variances[a], variances[b]], pooled, seeds), pooled, confidence)
            for interval, (a, b) in zip(intervals, pairs, strict=True)
        ]


def measure_coverage(population: Population, scenario: Scenario, seeds: int, suites: int, random_seed: int) -> Coverage:
    """Return the coverage and the median half-width of the intervals of ``suites`` simulated suites."""
    random = numpy.random.default_rng([random_seed, scenario.methods, seeds])
    scores = draw_suites(population, scenario, seeds, suites, random)
    by_suite = list(compute_intervals(scores))
    return Coverage(
        sum(all(one.low <= 0 <= one.high for one in intervals) for intervals in by_suite),
        float(numpy.median([(one.high - one.low) / 2 for intervals in by_suite for one in intervals])),
    )


def build_rows(population: Population, suites: int) -> Iterator[dict[str, str]]:
    """Yield the table's rows: covered suites and the median half-width for each number of seeds."""
    for methods in METHOD_COUNTS:
        for random_seed, scenario in enumerate(list_scenarios(population, methods)):
            row = {"methods": str(methods), "seed variance / example variance": scenario.label}
            for seeds in SEED_COUNTS:
                result = measure_coverage(population, scenario, seeds, suites, random_seed)
                row[f"{seeds} seed{'s' * (seeds > 1)}"] = f"{result.num_covered:,} (±{result.median_half_width:.1f})"
            yield row


def main() -> None:
    """Run the simulation; print the table or insert it into a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("records", type=Path, help="Folder of a suite's records with several seeds.")
    parser.add_argument("--suites", type=int, default=1000, help="Number of simulated suites per cell.")
    parser.add_argument("--update-file", type=Path, help="File with the table's section.")
    parser.add_argument("--marker", default="coverage", help="Name of the section.")
    args = parser.parse_args()
    rows = list(build_rows(read_population(args.records), args.suites))
    table = tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
    if args.update_file:
        insert_block(table, args.update_file, args.marker)
    else:
        print(table)


if __name__ == "__main__":
    main()
