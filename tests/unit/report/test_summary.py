"""The comparison in words: what intervals support is said, and nothing else."""

from __future__ import annotations

import re

import numpy
import pytest

from peftbench.record import Device, Memory, Outcome, RunRecord
from peftbench.report.analysis.significance import compare_groups
from peftbench.report.summary import MAX_SENTENCES, summarize
from tests.unit.report.records import costly, judged, noise, record

COUNT = 100
BASE = noise(COUNT, 0, spread=10)
VERDICT = re.compile(r"\b(?:better|worse|higher|lower|wins?|beats?)\b")
OPENING = "Compared by ROUGE-L of generated summaries (higher is better) with full."
ONE_SEED = "one seed each; another seed may change the order."


def scores(off: float, seed: int = 1, spread: float = 3.0) -> list[float]:
    """Of a method whose mean is just ``off`` from full fine-tuning's, and which finds the same examples hard."""
    own = noise(COUNT, seed, spread)
    middle = sum(own) / COUNT
    return [base + off + one - middle for base, one in zip(BASE, own, strict=True)]


def full(**changes: object) -> RunRecord:
    """Full fine-tuning, at 1,000 bytes, a second a step and 100 FLOPs unless said otherwise."""
    return judged("full", "full", BASE, **(costly(1000, 1.0, 100) | changes))


def lora(off: float, **changes: object) -> RunRecord:
    """LoRA, at less of everything."""
    return judged("lora", "lora", scores(off), **(costly(860, 0.82, 69) | changes))


def of(records: list[RunRecord], about: str) -> str:
    """The one sentence that begins so."""
    (found,) = [sentence for sentence in summarize(records) if sentence.startswith(about)]
    return found


def verdicts(said: list[str]) -> list[str]:
    """Sentences that call one better or worse than another, and not that none is."""
    plain = (sentence.replace("(higher is better)", "").replace("(lower is better)", "") for sentence in said)
    without = (re.sub(r"N[^;.]* is significantly better( than \S+)?", "", sentence) for sentence in plain)
    return [sentence for sentence in without if VERDICT.search(sentence)]


@pytest.mark.parametrize(
    ("off", "words"),
    [
        (4.0, r"lora is better than full by 4\.0 ROUGE-L \(interval 3\.\d to 4\.\d\), at"),
        (-4.0, r"lora is worse than full by 4\.0 ROUGE-L \(interval 3\.\d to 4\.\d\), at"),
        (
            0.1,
            r"lora is within 0\.\d ROUGE-L of full \(difference \+0\.1, interval -0\.\d to \+0\.\d; not significant\),",
        ),
    ],
)
def test_a_difference_and_none(off: float, words: str) -> None:
    """A real one has its direction, size and interval; another only how far apart the two can be at most."""
    said = summarize([full(), lora(off)])
    assert said[0] == OPENING
    assert re.match(words, said[1])
    assert said[1].endswith(" at 86 % of its memory, 82 % of its time (single runs) and 69 % of its model FLOPs.")
    assert said[2:] == [
        f"Intervals have 95 % confidence for the single comparison: paired bootstrap over {COUNT} held-out examples, "
        f"{ONE_SEED}"
    ]


def test_within_is_the_further_end() -> None:
    """The bound is what the interval supports, whichever side of zero reaches further."""
    for off in (0.3, -0.3):
        sentence = of([full(), lora(off)], "lora")
        within, low, high = re.search(r"within (\S+) .* interval (\S+) to ([^;]+);", sentence).groups()  # type: ignore[union-attr]
        assert float(within) == max(-float(low), float(high))
        (found,) = compare_groups([full(), lora(off)]).pair_comparisons
        assert (
            max(-found.interval.low, found.interval.high)
            <= float(within)
            <= 0.1 + max(-found.interval.low, found.interval.high)
        )


@pytest.mark.parametrize(
    ("changes", "end"),
    [
        (costly(860, 0.82, 69, device="another GPU"), "; it ran on a different device, so costs are not compared."),
        (costly(860, 0.82, 69, engine="zero2"), "; it ran on a different engine, so costs are not compared."),
        ({"steps": 6}, "; it ran with different steps or batches, so costs are not compared."),
        (
            costly(860, 0.98, 69),
            ", at 86 % of its memory and 69 % of its model FLOPs; time does not differ measurably.",
        ),
        (
            {"throughput": costly(1, 0.1, 1)["throughput"].model_copy(update={"steps": 9})},
            ", at 86 % of its memory and 69 % of its model FLOPs.",
        ),
        ({"memory": {}}, ", at 82 % of its time (single runs) and 69 % of its model FLOPs."),
        ({"memory": {}, "throughput": None}, ", at 69 % of its model FLOPs."),
        (
            costly(3, 2.5, 1),
            ", at 0.3 % of its memory, 250 % of its time (single runs) and 1 % of its model FLOPs.",
        ),
    ],
)
def test_costs(changes: dict[str, object], end: str) -> None:
    """Costs of like runs are ratios; time where steps' ranges lie apart; what is not known is left out."""
    assert of([full(), lora(4.0, **changes)], "lora").endswith(f"){end}")


def _peaks(kind: str, sizes: list[int], device: str) -> list[RunRecord]:
    """A run for each peak, all as fast."""
    where = Device(type=device, name="it", num_processes=1)
    return [
        judged(
            f"{kind}-seed={s}",
            kind,
            scores(0, s),
            seed=s,
            data_seed=0,
            **costly(1, 1.0, 100)
            | {
                "device": where,
                "memory": {"train": _memory(size, device)},
            },
        )
        for s, size in enumerate(sizes)
    ]


def _memory(size: int, device: str) -> Memory:
    on_cpu = Memory(rss_bytes=2**30 + size, baseline_rss_bytes=2**30)
    return on_cpu if device == "cpu" else Memory(allocated_bytes=size)


@pytest.mark.parametrize(
    ("device", "reference", "peaks", "told"),
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
def test_memory_that_cannot_be_told_apart(
    device: str, reference: list[int], peaks: list[int], told: str | None
) -> None:
    """Peaks that overlap over seeds, or on a CPU lie as near as pages come and go, are no difference."""
    sizes = [[mib * 2**20 for mib in given] for given in (reference, peaks)]
    sentence = of([*_peaks("full", sizes[0], device), *_peaks("lora", sizes[1], device)], "lora")
    assert ("memory and time do not differ measurably" in sentence) == (told is None)
    assert ("of its memory" in sentence) == (told is not None)
    assert told is None or told in sentence


def test_a_ratio_of_times_is_of_runs_where_there_are_several() -> None:
    """One run each says of their own steps alone that the one is faster, and that is said; of three seeds it is not."""
    slow, fast = costly(860, 1.0, 69), costly(860, 0.5, 69)
    assert "50 % of its time (single runs) and" in of([full(), lora(4.0, **fast)], "lora")
    rows = [judged(f"full-seed={s}", "full", scores(0, s), seed=s, data_seed=0, **slow) for s in range(3)]
    rows += [judged(f"lora-seed={s}", "lora", scores(9, s + 3), seed=s, data_seed=0, **fast) for s in range(3)]
    assert "50 % of its time and 100 % of" in of(rows, "lora")


def seeds(name: str, kind: str, offs: list[float]) -> list[RunRecord]:
    """A run for each seed."""
    first = sum(map(ord, name))
    return [judged(f"{name}-seed={s}", kind, scores(off, first + s), seed=s, data_seed=0) for s, off in enumerate(offs)]


def test_seeds_that_agree_and_seeds_that_do_not() -> None:
    """Three seeds of one mind support a difference that one lucky seed among three does not."""
    agreed = summarize([*seeds("full", "full", [0, 0, 0]), *seeds("lora", "lora", [5.5, 6, 6.5])])
    assert agreed[1].startswith("lora is better than full by 6.0 ROUGE-L (interval 4.")
    assert agreed[-1].endswith(
        f"paired bootstrap over {COUNT} held-out examples, and Student's t over 3 seeds (the wider of both)."
    )
    lucky = [*seeds("full", "full", [0, 0, 0]), *seeds("lora", "lora", [12, 0, 0])]
    (found,) = compare_groups(lucky).pair_comparisons
    assert found.interval_over_examples.low > 0
    assert verdicts(summarize(lucky)) == []
    assert re.match(
        r"lora is within \d\d\.\d ROUGE-L of full \(.*; not significant over 3 seeds\)", summarize(lucky)[1]
    )


def test_pairs_of_one_seed_beside_pairs_of_several() -> None:
    """Of one seed there is no interval over seeds, and the caution stays."""
    rows = [*seeds("full", "full", [0, 0, 0]), *seeds("lora", "lora", [6, 6, 6]), *seeds("head", "last_layer", [0])]
    assert summarize(rows)[-1].endswith(
        f"over {COUNT} held-out examples, and Student's t over up to 3 seeds for pairs with several "
        "(the wider of both); "
        "another seed may change the order of pairs with one."
    )


def test_an_interval_beyond_the_scale_is_no_bound() -> None:
    """ROUGE-L ends at 100: where two seeds leave more than that, no bound is named."""
    said = summarize([*seeds("full", "full", [0, 0]), *seeds("lora", "lora", [14, -6])])
    assert said[1] == (
        "lora and full are indistinguishable (difference +4.0; with 2 seeds the interval exceeds the scale)."
    )


def test_the_reference_is_full_or_was_chosen() -> None:
    """Full fine-tuning if it ended well; else the best mean, of which it is said that the same figure chose it."""
    last = judged("last_layer", "last_layer", scores(-8, 2))
    oom = full(quality=None, outcome=Outcome(kind="oom", step=2))
    assert summarize([full(), last, lora(9)])[0] == OPENING
    assert summarize([oom, last, lora(9)])[0] == (
        "Compared by ROUGE-L of generated summaries (higher is better) with lora, selected as the best trained "
        "configuration by this metric."
    )
    two = [full(), judged("full-slow", "full", scores(-9, 3), method={"x": 1}), lora(0)]
    assert summarize(two)[0] == OPENING.replace("full.", "full, the best of its method by this metric.")


@pytest.mark.parametrize(
    ("outcome", "sentence"),
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
def test_how_a_run_ended_is_said(outcome: Outcome, sentence: str) -> None:
    """A run without a result is told, with what would fit, and stands in no comparison."""
    said = summarize([full(quality=None, outcome=outcome), lora(0)])
    assert sentence in said
    assert sum("full" in one for one in said) == 1
    assert verdicts(said) == []


def test_some_seeds_that_ended_otherwise() -> None:
    """Of three seeds one diverged: the others are compared, and the one is told."""
    runs = [*seeds("full", "full", [0, 0, 0]), *seeds("lora", "lora", [5.5, 6, 6.5])]
    runs[4] = runs[4].model_copy(update={"outcome": Outcome(kind="diverged", step=7)})
    said = summarize(runs)
    assert "over 2 seeds" in said[2]
    assert said[3] == "lora (1 of 3 runs): diverged at step 7, so its quality is not compared."


def test_baselines_beside_what_was_trained() -> None:
    """Which are better than the untrained base, and that none is better than the lead, which is the sentence to see."""
    rows = [full(), lora(2), judged("zero_shot", "zero_shot", scores(-9, 3)), judged("lead_1", "lead", scores(2, 4))]
    none = (
        r"No trained configuration is significantly better than lead_1; full is worse than lead_1, by 1\.\d ROUGE-L at"
    )
    assert re.match(none, of(rows, "No"))
    sentence = of(rows, "lora and full are better than zero_shot, by ")
    least = float(re.search(r"by (\S+) ROUGE-L at least", sentence).group(1))  # type: ignore[union-attr]
    compared = compare_groups(rows)
    base = compared.groups[2]
    bounds = [found.interval.low for one in compared.groups[:2] if (found := compared.between(one, base))]
    assert least <= min(bounds) < least + 0.1


def test_baselines_alone() -> None:
    """Without a trained configuration the baselines are compared, and no seed is spoken of."""
    said = summarize([judged("zero_shot", "zero_shot", scores(-9, 3)), judged("lead_1", "lead", scores(2, 4))])
    assert said[0].endswith("with lead_1, selected as the best configuration by this metric.")
    assert said[1].startswith("zero_shot is worse than lead_1 by 1")
    assert said[2].endswith("held-out examples.")
    assert len(said) == 3


def test_an_unfair_table_says_so_first() -> None:
    """Runs of other batches are compared, but not as methods, and their costs are not."""
    said = summarize([full(), lora(9, global_batch_size=2)])
    assert said[0].startswith("These runs differ in more than their method")
    assert said[0].endswith("so a difference may not be due to the method.")
    assert "with different steps or batches" in said[2]


def test_few_examples() -> None:
    """Of 16 examples nothing is concluded, however far apart the means are; costs are told."""
    rows = [
        judged("full", "full", [1.0] * 16, **costly(9, 1, 9)),
        judged("lora", "lora", [9.0] * 16, **costly(3, 2, 9)),
    ]
    assert summarize(rows) == [
        "lora is compared with full by costs only, at 33 % of its memory, 200 % of its time (single runs) and 100 % "
        "of its model FLOPs.",
        "No conclusion about quality: 16 held-out examples are too few (at least 20 are needed).",
    ]


@pytest.mark.parametrize("count", [1, 2])
def test_hardly_any_examples(count: int) -> None:
    """Of one held-out example, or two, nothing is concluded, and nothing breaks."""
    rows = [judged("full", "full", BASE[:count]), judged("lora", "lora", scores(4)[:count])]
    said = summarize(rows)
    assert len(said) == 1
    assert said[0].startswith(
        "No conclusion about quality: one held-out" if count == 1 else "No conclusion about quality: 2 held-out"
    )


def test_runs_of_several_commits() -> None:
    """Between the seeds of one configuration nothing else should differ, the code neither."""
    runs = seeds("full", "full", [0, 0, 0]) + seeds("lora", "lora", [1, 2, 3])
    runs = [run.model_copy(update={"git_commit": "a" if i < 4 else "b"}) for i, run in enumerate(runs)]
    assert of(runs, "Runs of one") == (
        "Runs of one configuration come from different commits, so not only seeds may differ: lora."
    )
    assert len(compare_groups(runs).groups) == 2
    assert not any("commit" in one for one in summarize(runs[:4]))


def test_a_baseline_that_shares_no_seed_is_in_no_sentence_but_one() -> None:
    """Beside a baseline of other seeds nothing was compared, and there is no "none of 0"."""
    base = [judged(f"base-seed={s}", "zero_shot", scores(-9, s), seed=s) for s in (7, 8)]
    said = summarize([full(), lora(4), *base])
    assert not any("significantly" in one or "None of" in one for one in said)
    assert "full and base (zero_shot) have no common seed and are not compared." in said
    more = [*base, judged("base-seed=0", "zero_shot", scores(9, 3))]
    one = judged("last", "last_layer", scores(0), seed=3)
    assert of([full(), one, *more], "full, the only").startswith(
        "full, the only configuration compared with base (zero_shot), is not significantly better"
    )


def test_old_records() -> None:
    """Without scores by example nothing is concluded about quality, which is said once; costs are told."""
    rows = [record("full", "full", 1, **costly(9, 1, 9)), record("lora", "lora", 1, loss=9.0, **costly(3, 2, 9))]
    said = summarize(rows)
    assert said[0].startswith("lora is compared with full by costs only, at 33 %")
    assert said[1:] == [
        "Not compared, no per-example scores in the record: full and lora.",
        "No conclusion about quality: no two configurations have comparable per-example scores.",
    ]
    unknown = [record("full", "full", 1), record("lora", "lora", 1)]
    assert len(summarize(unknown)) == 2
    apart = [rows[0], record("lora", "lora", 1, **costly(3, 2, 9, device="b"))]
    assert summarize(apart)[0] == "lora ran on a different device than full, so costs are not compared."


def test_a_loss_that_is_lower_is_better() -> None:
    """Held-out loss has its own unit, digits and direction."""
    tokens = [10] * COUNT
    rows = [
        judged("full", "full", None, losses=[31.0 + 0.1 * (i % 2) for i in range(COUNT)], labelled=tokens),
        judged("lora", "lora", None, losses=[29.0] * COUNT, labelled=tokens),
    ]
    said = summarize(rows)
    assert said[0] == "Compared by held-out loss (lower is better) with full."
    assert re.fullmatch(r"lora is better than full by 0\.205 nats \(interval 0\.20\d to 0\.20\d\)\.", said[1])


def test_the_very_same_scores() -> None:
    """Nothing tells two configurations apart that score alike on every example, and no interval of no width says so."""
    assert (
        of([judged("full", "full", BASE), judged("lora", "lora", BASE)], "lora")
        == "lora has the same score as full on every example."
    )


def test_many_configurations_stay_short() -> None:
    """Twenty methods are told in twelve sentences, and how many more there are; thirty ends likewise."""
    rows = [full()] + [judged(f"m{i:02}", f"m{i:02}", scores(0, i)) for i in range(20)]
    said = summarize(rows)
    assert sum(" is within " in one for one in said) == MAX_SENTENCES
    assert "And 8 more in the table." in said
    ended = [record(f"d{i:02}", f"d{i:02}", 1, outcome=Outcome(kind="diverged")) for i in range(30)]
    assert len(summarize(ended)) == MAX_SENTENCES + 2
    assert "And 18 more in the table." in summarize(ended)


@pytest.mark.parametrize(
    "name", ["better\nworse", "x | y", "<script>alert(1)</script>", "", "a" * 300, "\x00\x1b[2J", "{0}%s"]
)
def test_names_are_names(name: str) -> None:
    """Whatever a run is called, each sentence is one line, and holds the name as it is."""
    said = summarize([full(), judged(name, "lora", scores(4))])
    assert all(one.isprintable() and one.endswith(".") for one in said)
    assert " ".join(name.replace("\x00", " ").replace("\x1b", " ").split()) in said[1]
    assert " is better than full by " in said[1]


def test_chance_is_put_into_words_as_seldom_as_is_said() -> None:
    """Over 200 tables of a baseline and three methods that do not differ, at most some 5 % say better or worse."""
    wrong = 0
    for draw in range(200):
        random = numpy.random.default_rng(draw)
        kinds = ("full", "lora", "last_layer", "zero_shot")
        wrong += bool(verdicts(summarize([judged(kind, kind, list(random.normal(30, 9, size=40))) for kind in kinds])))
    assert 1 <= wrong <= 16


def test_of_nothing() -> None:
    """One record says nothing of others."""
    assert summarize([full()]) == [
        "No conclusion about quality: no two configurations have comparable per-example scores."
    ]
    assert summarize([full()], compare_groups([full()])) == summarize([full()])
