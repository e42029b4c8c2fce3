"""Coverage and width of the report's intervals on simulated suites."""

from __future__ import annotations

import importlib.util
import itertools
import re
import sys
from typing import Any

import numpy
import pytest
from scipy.stats import binom

from peftbench.report.analysis.significance import compare_groups
from tests.helpers.paths import REPOSITORY
from tests.unit.report.records import build_judged_record

SUITES = 100


def _load_simulation() -> Any:
    """Import the script, which is in no package."""
    spec = importlib.util.spec_from_file_location(
        "seed_coverage_simulation", REPOSITORY / "benchmarks" / "seed_coverage" / "simulation.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


simulation = _load_simulation()
SEVERAL_SEEDS = simulation.SEED_COUNTS[1:]


@pytest.fixture(scope="module")
def population() -> Any:
    """Return the population of the committed records."""
    return simulation.read_population(REPOSITORY / "docs" / "results" / "demo_seeds")


def lowest_plausible(suites: int) -> int:
    """Return the smallest number of covered suites that is not below 95 % at the 1 % level."""
    return int(binom.ppf(0.01, suites, 0.95))


@pytest.mark.parametrize("methods", simulation.METHOD_COUNTS)
@pytest.mark.parametrize("ratio", [0.0, 1.0, 16.0])
def test_intervals_cover_and_shrink_with_seeds(population: Any, methods: int, ratio: float) -> None:
    """Simulate few suites: every number of seeds covers, and each has narrower intervals than the one before."""
    scenario = simulation.Scenario(methods, "", ratio)
    results = [simulation.measure_coverage(population, scenario, seeds, SUITES, 0) for seeds in SEVERAL_SEEDS]
    assert min(result.num_covered for result in results) >= lowest_plausible(SUITES)
    widths = [result.median_half_width for result in results]
    assert widths == sorted(set(widths), reverse=True)


def test_interval_over_examples_does_not_cover_other_seeds(population: Any) -> None:
    """With one seed there is an interval over examples only, which misses most suites if seeds vary more."""
    result = simulation.measure_coverage(population, simulation.Scenario(4, "", 16.0), 1, SUITES, 0)
    assert result.num_covered < lowest_plausible(SUITES) / 2


@pytest.mark.parametrize("seeds", [1, 3])
def test_simulated_intervals_are_those_of_the_report(population: Any, seeds: int) -> None:
    """Compare the intervals of one suite with those of its records."""
    suite = simulation.draw_suites(population, simulation.Scenario(3, "", 1.0), seeds, 1, numpy.random.default_rng(0))
    records = [
        build_judged_record(f"{kind}-seed={seed}", kind, list(scores), seed=seed)
        for kind, by_seed in zip(("full", "lora", "last_layer"), suite[0], strict=True)
        for seed, scores in enumerate(by_seed)
    ]
    comparisons = compare_groups(records)
    expected = [comparisons.between(*pair) for pair in itertools.combinations(comparisons.groups, 2)]
    (intervals,) = simulation.compute_intervals(suite)
    assert [(one.low, one.high) for one in intervals] == [
        pytest.approx((pair.interval.low, pair.interval.high)) for pair in expected if pair is not None
    ]
    assert len(intervals) == 3


def test_simulated_variances_have_the_stated_ratio(population: Any) -> None:
    """Seeds of a difference vary as stated, relative to its variance over examples; a noisy method varies more."""
    random = numpy.random.default_rng(0)
    for factor in (1.0, 9.0):
        scores = simulation.draw_suites(population, simulation.Scenario(2, "", 4.0, factor), 2, 4000, random)
        effects = scores.mean(axis=3)
        variances = effects.var(axis=2, ddof=1).mean(axis=0)
        noise = population.residuals.var(axis=-1).mean() / scores.shape[-1]
        expected = 4.0 * population.example_variance / 2
        assert variances - noise == pytest.approx([factor * expected, expected], rel=0.1)


def test_table_in_the_docs_covers_and_shrinks(population: Any) -> None:
    """Check every row: at least 933 of 1,000 suites are covered with several seeds, and each width is smaller."""
    text = (REPOSITORY / "docs" / "concepts" / "statistics.md").read_text(encoding="utf-8")
    table = text.split("<!-- report:coverage -->")[1].split("<!-- end of report:coverage -->")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.strip().splitlines()[2:]]
    scenarios = [one for methods in simulation.METHOD_COUNTS for one in simulation.list_scenarios(population, methods)]
    assert [(int(row[0]), row[1]) for row in rows] == [(one.methods, one.label) for one in scenarios]
    assert lowest_plausible(1000) == 933
    for row, scenario in zip(rows, scenarios, strict=True):
        cells = [re.fullmatch(r"([\d,]+) \(±([\d.]+)\)", cell) for cell in row[2:]]
        assert None not in cells
        covered = [int(cell[1].replace(",", "")) for cell in cells if cell]
        widths = [float(cell[2]) for cell in cells if cell]
        assert min(covered[1:]) >= 933
        assert widths[1:] == sorted(set(widths[1:]), reverse=True)
        if "records" in scenario.label:
            assert widths[simulation.SEED_COUNTS.index(5)] == pytest.approx(widths[0], rel=0.05)
            assert widths[simulation.SEED_COUNTS.index(10)] < widths[0]
