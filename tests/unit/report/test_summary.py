"""The summary of a comparison: its sentences state what the intervals support, and nothing else."""

from __future__ import annotations

import re

import numpy
import pytest

from peftbench.record import Device, Memory, Outcome, ParameterCounts, RunRecord
from peftbench.report.analysis.significance import compare_groups
from peftbench.report.summary import MAX_SENTENCES, summarize
from tests.unit.report.records import build_costs, build_judged_record, build_record, draw_scores

COUNT = 100
BASE = draw_scores(COUNT, 0, spread=10)
VERDICT = re.compile(r"\b(?:better|worse|higher|lower|wins?|beats?)\b")
OPENING = "Compared by ROUGE-L (higher is better) with full."
ONE_SEED = "on seed 0; another seed may change the order: use 3 seeds."


def scores(shift: float, seed: int = 1, spread: float = 3.0) -> list[float]:
    """Return scores that correlate with those of full fine-tuning and whose mean differs by exactly ``shift``."""
    noisy = draw_scores(COUNT, seed, spread)
    mean = sum(noisy) / COUNT
    return [base + shift + value - mean for base, value in zip(BASE, noisy, strict=True)]


def build_full_run(**changes: object) -> RunRecord:
    """Build a run of full fine-tuning, by default with 1,000 bytes, one second per step and 100 FLOPs."""
    return build_judged_record("full", "full", BASE, **(build_costs(1000, 1.0, 100) | changes))


def build_lora_run(shift: float, **changes: object) -> RunRecord:
    """Build a LoRA run, by default with lower costs than full fine-tuning."""
    return build_judged_record("lora", "lora", scores(shift), **(build_costs(860, 0.82, 69) | changes))


def find_sentence(records: list[RunRecord], prefix: str) -> str:
    """Return the one sentence of the summary that starts with ``prefix``."""
    (match,) = [sentence for sentence in summarize(records) if sentence.startswith(prefix)]
    return match


def find_verdicts(sentences: list[str]) -> list[str]:
    """Return the sentences that call one configuration better or worse than another."""
    without_directions = (
        sentence.replace("(higher is better)", "").replace("(lower is better)", "") for sentence in sentences
    )
    without_denials = (
        re.sub(r"N[^;.]* is significantly better( than \S+)?", "", sentence) for sentence in without_directions
    )
    return [sentence for sentence in without_denials if VERDICT.search(sentence)]


@pytest.mark.parametrize(
    ("shift", "pattern"),
    [
        (4.0, r"lora is better than full by 4\.0 ROUGE-L on seed 0 \(interval 3\.\d to 4\.\d\), at"),
        (-4.0, r"lora is worse than full by 4\.0 ROUGE-L on seed 0 \(interval 3\.\d to 4\.\d\), at"),
        (
            0.1,
            r"lora is within 0\.\d ROUGE-L of full on seed 0 "
            r"\(difference \+0\.1, interval -0\.\d to \+0\.\d; not significant\),",
        ),
    ],
)
def test_difference_sentence_matches_significance(shift: float, pattern: str) -> None:
    """State the direction, size and interval of a significant difference, and a bound for any other."""
    sentences = summarize([build_full_run(), build_lora_run(shift)])
    assert sentences[0] == OPENING
    assert re.match(pattern, sentences[1])
    assert sentences[1].endswith(" at 86 % of its memory, 82 % of its time (single runs) and 69 % of its model FLOPs.")
    assert sentences[2:] == [
        f"Intervals have 95 % confidence for the single comparison: paired bootstrap over {COUNT} held-out examples "
        f"{ONE_SEED}"
    ]


def test_bound_is_the_larger_end_of_the_interval() -> None:
    """Check that the bound covers the interval, whichever side of zero reaches further."""
    for shift in (0.3, -0.3):
        sentence = find_sentence([build_full_run(), build_lora_run(shift)], "lora")
        bound, low, high = re.search(r"within (\S+) .* interval (\S+) to ([^;]+);", sentence).groups()  # type: ignore[union-attr]
        assert float(bound) == max(-float(low), float(high))
        (pair,) = compare_groups([build_full_run(), build_lora_run(shift)]).pair_comparisons
        assert (
            max(-pair.interval.low, pair.interval.high)
            <= float(bound)
            <= 0.1 + max(-pair.interval.low, pair.interval.high)
        )


@pytest.mark.parametrize(
    ("changes", "ending"),
    [
        (
            build_costs(860, 0.82, 69, device="another GPU"),
            "; it ran on a different device, so costs are not compared.",
        ),
        (build_costs(860, 0.82, 69, engine="zero2"), "; it ran on a different engine, so costs are not compared."),
        ({"steps": 6}, "; it ran with different steps or batches, so costs are not compared."),
        (
            build_costs(860, 0.98, 69),
            ", at 86 % of its memory and 69 % of its model FLOPs; time does not differ measurably.",
        ),
        (
            {"throughput": build_costs(1, 0.1, 1)["throughput"].model_copy(update={"steps": 9})},
            ", at 86 % of its memory and 69 % of its model FLOPs.",
        ),
        ({"memory": {}}, ", at 82 % of its time (single runs) and 69 % of its model FLOPs."),
        ({"memory": {}, "throughput": None}, ", at 69 % of its model FLOPs."),
        (
            build_costs(3, 2.5, 1),
            ", at 0.3 % of its memory, 250 % of its time (single runs) and 1 % of its model FLOPs.",
        ),
    ],
)
def test_costs_are_compared_between_similar_runs(changes: dict[str, object], ending: str) -> None:
    """Report costs as ratios, time only if the ranges of step times do not overlap, and leave out unknown costs."""
    assert find_sentence([build_full_run(), build_lora_run(4.0, **changes)], "lora").endswith(f"){ending}")


def _build_runs_with_peaks(kind: str, sizes: list[int], device_type: str) -> list[RunRecord]:
    """Build one run per peak size in bytes, all equally fast."""
    device = Device(type=device_type, name="it", num_processes=1)
    return [
        build_judged_record(
            f"{kind}-seed={s}",
            kind,
            scores(0, s),
            seed=s,
            data_seed=0,
            **build_costs(1, 1.0, 100)
            | {
                "device": device,
                "memory": {"train": _build_memory(size, device_type)},
            },
        )
        for s, size in enumerate(sizes)
    ]


def _build_memory(size: int, device_type: str) -> Memory:
    on_cpu = Memory(rss_bytes=2**30 + size, baseline_rss_bytes=2**30)
    return on_cpu if device_type == "cpu" else Memory(allocated_bytes=size)


@pytest.mark.parametrize(
    ("device_type", "reference", "peaks", "expected"),
    [
        ("cuda", [100], [101], "101 % of its memory"),
        ("cuda", [100], [100], "100 % of its memory"),
        ("cuda", [100, 104], [103, 110], None),
        ("cuda", [100, 104], [105, 111], "106 % of its memory"),
        ("cuda", [100, 101, 110], [100, 109, 110], None),
        ("cuda", [100, 100], [100, 100], "100 % of its memory"),
        ("cpu", [800], [800 + 63], None),
        ("cpu", [800], [880], "110 % of its memory"),
    ],
)
def test_memory_ratio_needs_measurable_difference(
    device_type: str, reference: list[int], peaks: list[int], expected: str | None
) -> None:
    """Report no ratio if peaks overlap over seeds or, on a CPU, differ by less than the noise of RSS."""
    sizes = [[mib * 2**20 for mib in sizes_mib] for sizes_mib in (reference, peaks)]
    runs = [
        *_build_runs_with_peaks("full", sizes[0], device_type),
        *_build_runs_with_peaks("lora", sizes[1], device_type),
    ]
    sentence = find_sentence(runs, "lora")
    assert ("memory and time do not differ measurably" in sentence) == (expected is None)
    assert ("of its memory" in sentence) == (expected is not None)
    assert expected is None or expected in sentence


def test_time_ratio_of_single_runs_is_marked() -> None:
    """Mark a time ratio as one of single runs with one seed per method, but not with three."""
    slow, fast = build_costs(860, 1.0, 69), build_costs(860, 0.5, 69)
    assert "50 % of its time (single runs) and" in find_sentence(
        [build_full_run(), build_lora_run(4.0, **fast)], "lora"
    )
    rows = [build_judged_record(f"full-seed={s}", "full", scores(0, s), seed=s, data_seed=0, **slow) for s in range(3)]
    rows += [
        build_judged_record(f"lora-seed={s}", "lora", scores(9, s + 3), seed=s, data_seed=0, **fast) for s in range(3)
    ]
    assert "50 % of its time and 100 % of" in find_sentence(rows, "lora")


def build_seeds(name: str, kind: str, shifts: list[float]) -> list[RunRecord]:
    """Build one run per seed, each with its own shift of the mean."""
    noise_seed = sum(map(ord, name))
    return [
        build_judged_record(f"{name}-seed={s}", kind, scores(shift, noise_seed + s), seed=s, data_seed=0)
        for s, shift in enumerate(shifts)
    ]


def test_reference_is_full_fine_tuning_or_best_mean() -> None:
    """Use full fine-tuning if it ended ok, else the best mean; then state that the same metric selected it."""
    last_layer = build_judged_record("last_layer", "last_layer", scores(-8, 2))
    full_oom = build_full_run(quality=None, outcome=Outcome(kind="oom", step=2))
    assert summarize([build_full_run(), last_layer, build_lora_run(9)])[0] == OPENING
    assert summarize([full_oom, last_layer, build_lora_run(9)])[0] == (
        "Compared by ROUGE-L (higher is better) with lora, selected as the best trained configuration by this metric."
    )
    two_full_runs = [
        build_full_run(),
        build_judged_record("full-slow", "full", scores(-9, 3), method={"x": 1}),
        build_lora_run(0),
    ]
    assert summarize(two_full_runs)[0] == OPENING.replace("full.", "full, the best of its method by this metric.")


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (
            Outcome(
                kind="oom",
                step=2,
                phase="train",
                step_part="backward",
                requested_bytes=2**22,
                estimated_peak_bytes=120 * 2**20,
                suggestion="train.micro_batch_size=1 is predicted to fit",
            ),
            "full: out of memory in the backward pass of step 2 (requested 4.0 MiB); estimated need: at least 120 "
            "MiB; train.micro_batch_size=1 is predicted to fit.",
        ),
        (Outcome(kind="oom", phase="load"), "full: out of memory in load."),
        (Outcome(kind="oom"), "full: out of memory."),
        (Outcome(kind="diverged", step=40), "full: diverged at step 40, so its quality is not compared."),
        (
            Outcome(kind="preempted", step=3),
            "full: was stopped at step 3 and has no result; run the same command to resume it.",
        ),
        (Outcome(kind="failed", phase="train", error="one\n two"), "full: failed in train: one two."),
        (Outcome(kind="failed", error="x" * 999), f"full: failed: {'x' * 200}…."),
    ],
)
def test_outcome_other_than_ok_is_reported(outcome: Outcome, expected: str) -> None:
    """Report the outcome with a suggestion that fits, and leave the run out of all comparisons."""
    sentences = summarize([build_full_run(quality=None, outcome=outcome), build_lora_run(0)])
    assert expected in sentences
    assert sum("full" in sentence for sentence in sentences) == 1
    assert find_verdicts(sentences) == []


def test_diverged_seed_is_reported_and_not_compared() -> None:
    """Compare the two seeds with outcome ok, and report the third."""
    runs = [*build_seeds("full", "full", [0, 0, 0]), *build_seeds("lora", "lora", [5.5, 6, 6.5])]
    runs[4] = runs[4].model_copy(update={"outcome": Outcome(kind="diverged", step=7)})
    sentences = summarize(runs)
    assert "and 2 seeds together" in sentences[2]
    assert sentences[3] == "lora (1 of 3 runs): diverged at step 7, so its quality is not compared."


def test_baselines_are_compared_with_trained_configurations() -> None:
    """List the configurations that are better than the untrained base, and state that none is better than the lead."""
    rows = [
        build_full_run(),
        build_lora_run(2),
        build_judged_record("zero_shot", "zero_shot", scores(-9, 3)),
        build_judged_record("lead_1", "lead", scores(2, 4)),
    ]
    none_better = (
        r"No trained configuration is significantly better than lead_1 on seed 0; "
        r"full is worse than lead_1 on seed 0, by 1\.\d ROUGE-L at"
    )
    assert re.match(none_better, find_sentence(rows, "No"))
    sentence = find_sentence(rows, "lora and full are better than zero_shot on seed 0, by ")
    stated_bound = float(re.search(r"by (\S+) ROUGE-L at least", sentence).group(1))  # type: ignore[union-attr]
    comparisons = compare_groups(rows)
    base = comparisons.groups[2]
    bounds = [pair.interval.low for group in comparisons.groups[:2] if (pair := comparisons.between(group, base))]
    assert stated_bound <= min(bounds) < stated_bound + 0.1


def test_baselines_alone_are_compared_without_seeds() -> None:
    """Compare baselines if nothing was trained, without a note about seeds."""
    sentences = summarize(
        [
            build_judged_record("zero_shot", "zero_shot", scores(-9, 3)),
            build_judged_record("lead_1", "lead", scores(2, 4)),
        ]
    )
    assert sentences[0].endswith("with lead_1, selected as the best configuration by this metric.")
    assert sentences[1].startswith("zero_shot is worse than lead_1 by 1")
    assert sentences[2].endswith("held-out examples.")
    assert len(sentences) == 3


def test_different_batch_sizes_are_noted_first() -> None:
    """Note first that the runs differ in more than their method, and leave out costs."""
    sentences = summarize([build_full_run(), build_lora_run(9, global_batch_size=2)])
    assert sentences[0] == (
        "These runs differ in more than their method: in train.global_batch_size (16 and 2). A difference between them "
        "may not be due to the method."
    )
    assert "with different steps or batches" in sentences[2]


@pytest.mark.parametrize(
    ("section", "values", "difference"),
    [
        ("train", {"precision": "bf16"}, "train.precision (fp32 and bf16)"),
        ("model", {"attention": "eager"}, "model.attention (null and eager)"),
    ],
)
def test_auto_settings_that_resolved_differently_are_named(
    section: str, values: dict[str, str], difference: str
) -> None:
    """Runs of one suite whose precision or attention differs are not comparable, in quality and in costs."""
    other = build_lora_run(9)
    recipe = other.recipe | {section: other.recipe.get(section, {}) | values}
    sentences = summarize([build_full_run(), other.model_copy(update={"recipe": recipe})])
    assert f"differ in more than their method: in {difference}." in sentences[0]
    assert "ran with a different precision or attention" in sentences[2]


@pytest.mark.parametrize(
    ("first", "trained", "is_noted"),
    [("fp32", 1, True), ("bf16", 1, False), ("fp32", 10, False), (None, 1, True)],
)
def test_types_of_frozen_weights_that_differ_are_named(first: str | None, trained: int, is_noted: bool) -> None:
    """A run that trains every weight has none; one without the key had a float32 base."""
    runs = (build_full_run(), first, trained), (build_lora_run(9), "bf16", 1)
    records = []
    for record, dtype, trainable in runs:
        model = record.recipe.get("model", {}) | ({} if dtype is None else {"dtype": dtype})
        parameters = ParameterCounts(total=10, trainable=trainable)
        records.append(record.model_copy(update={"recipe": record.recipe | {"model": model}, "parameters": parameters}))
    assert ("model.dtype (fp32 and bf16)" in summarize(records)[0]) == is_noted


def test_few_examples_allow_no_conclusion() -> None:
    """Draw no conclusion about quality from 16 examples, however different the means are, but compare costs."""
    rows = [
        build_judged_record("full", "full", [1.0] * 16, **build_costs(9, 1, 9)),
        build_judged_record("lora", "lora", [9.0] * 16, **build_costs(3, 2, 9)),
    ]
    assert summarize(rows) == [
        "lora is compared with full by costs only, at 33 % of its memory, 200 % of its time (single runs) and 100 % "
        "of its model FLOPs.",
        "No conclusion about quality: 16 held-out examples are too few (at least 20 are needed).",
    ]


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_examples_allow_no_conclusion(count: int) -> None:
    """Report only that the examples are too few."""
    rows = [build_judged_record("full", "full", BASE[:count]), build_judged_record("lora", "lora", scores(4)[:count])]
    sentences = summarize(rows)
    assert len(sentences) == 1
    assert sentences[0].startswith(
        "No conclusion about quality: one held-out" if count == 1 else "No conclusion about quality: 2 held-out"
    )


def test_seeds_from_different_commits_are_reported() -> None:
    """Report a configuration whose seeds ran on different commits; they stay one group."""
    runs = build_seeds("full", "full", [0, 0, 0]) + build_seeds("lora", "lora", [1, 2, 3])
    runs = [run.model_copy(update={"git_commit": "a" if i < 4 else "b"}) for i, run in enumerate(runs)]
    assert find_sentence(runs, "Runs of one") == (
        "Runs of one configuration come from different commits, so not only seeds may differ: lora."
    )
    assert len(compare_groups(runs).groups) == 2
    assert not any("commit" in sentence for sentence in summarize(runs[:4]))


def test_baseline_without_common_seed_is_reported_once() -> None:
    """Report only that it is not compared, without a count such as "none of 0"."""
    base = [build_judged_record(f"base-seed={s}", "zero_shot", scores(-9, s), seed=s) for s in (7, 8)]
    sentences = summarize([build_full_run(), build_lora_run(4), *base])
    assert not any("significantly" in sentence or "None of" in sentence for sentence in sentences)
    assert "full and base (zero_shot) have no common seed and are not compared." in sentences
    with_common_seed = [*base, build_judged_record("base-seed=0", "zero_shot", scores(9, 3))]
    last_layer = build_judged_record("last", "last_layer", scores(0), seed=3)
    assert find_sentence([build_full_run(), last_layer, *with_common_seed], "full, the only").startswith(
        "full, the only configuration compared with base (zero_shot), is not significantly better"
    )


def test_records_without_scores_compare_costs_only() -> None:
    """Report once that per-example scores are missing, draw no conclusion about quality, and compare costs."""
    rows = [
        build_record("full", "full", 1000, **build_costs(9, 1, 9)),
        build_record("lora", "lora", 1, loss=9.0, **build_costs(3, 2, 9)),
    ]
    sentences = summarize(rows)
    assert sentences[0].startswith("lora is compared with full by costs only, at 33 %")
    assert sentences[1:] == [
        "Not compared, no per-example scores in the record: full and lora.",
        "No conclusion about quality: no two configurations have comparable per-example scores.",
    ]
    without_costs = [build_record("full", "full", 1), build_record("lora", "lora", 1)]
    assert len(summarize(without_costs)) == 2
    other_device = [rows[0], build_record("lora", "lora", 1, **build_costs(3, 2, 9, device="b"))]
    assert summarize(other_device)[0] == "lora ran on a different device than full, so costs are not compared."


def test_lower_loss_is_better() -> None:
    """Report held-out loss with its own unit, number of digits and direction."""
    tokens = [10] * COUNT
    rows = [
        build_judged_record("full", "full", None, losses=[31.0 + 0.1 * (i % 2) for i in range(COUNT)], labeled=tokens),
        build_judged_record("lora", "lora", None, losses=[29.0] * COUNT, labeled=tokens),
    ]
    sentences = summarize(rows)
    assert sentences[0] == "Compared by held-out loss (lower is better) with full."
    assert re.fullmatch(
        r"lora is better than full by 0\.205 nats on seed 0 \(interval 0\.20\d to 0\.20\d\)\.", sentences[1]
    )


def test_equal_scores_are_reported_as_equal() -> None:
    """Report equal scores on all examples instead of an interval without width."""
    assert (
        find_sentence([build_judged_record("full", "full", BASE), build_judged_record("lora", "lora", BASE)], "lora")
        == "lora has the same score as full on every example on seed 0."
    )


def test_number_of_sentences_is_limited() -> None:
    """Report at most MAX_SENTENCES comparisons and as many outcomes, and count the rest."""
    rows = [build_full_run()] + [build_judged_record(f"m{i:02}", f"m{i:02}", scores(0, i)) for i in range(20)]
    sentences = summarize(rows)
    assert sum(" is within " in sentence for sentence in sentences) == MAX_SENTENCES
    assert "And 8 more in the table." in sentences
    diverged = [build_record(f"d{i:02}", f"d{i:02}", 1, outcome=Outcome(kind="diverged")) for i in range(30)]
    assert len(summarize(diverged)) == MAX_SENTENCES + 2
    assert "And 18 more in the table." in summarize(diverged)


@pytest.mark.parametrize(
    "name", ["better\nworse", "x | y", "<script>alert(1)</script>", "", "a" * 300, "\x00\x1b[2J", "{0}%s"]
)
def test_any_run_name_is_kept_on_one_line(name: str) -> None:
    """Check that each sentence is one printable line and contains the name."""
    sentences = summarize([build_full_run(), build_judged_record(name, "lora", scores(4))])
    assert all(sentence.isprintable() and sentence.endswith(".") for sentence in sentences)
    assert " ".join(name.replace("\x00", " ").replace("\x1b", " ").split()) in sentences[1]
    assert " is better than full by " in sentences[1]


def test_false_positives_stay_within_stated_level() -> None:
    """Summarize 200 tables of four methods with equal true scores: about 5 % state better or worse."""
    false_positives = 0
    for draw in range(200):
        random = numpy.random.default_rng(draw)
        kinds = ("full", "lora", "last_layer", "zero_shot")
        rows = [build_judged_record(kind, kind, list(random.normal(30, 9, size=40))) for kind in kinds]
        false_positives += bool(find_verdicts(summarize(rows)))
    assert 1 <= false_positives <= 16


def test_single_record_allows_no_conclusion() -> None:
    """Report only that no two configurations can be compared."""
    assert summarize([build_full_run()]) == [
        "No conclusion about quality: no two configurations have comparable per-example scores."
    ]
    assert summarize([build_full_run()], compare_groups([build_full_run()])) == summarize([build_full_run()])
