"""docs/reference/compatibility.md, made from the table: python -m peftbench.distributed.compatibility_docs."""

from __future__ import annotations

from collections import Counter

from tabulate import tabulate

from peftbench.distributed.compatibility import (
    OPTIONAL_FEATURES,
    PRECISIONS,
    Combination,
    Rule,
    describe_changes,
    find_blocking_rule,
    find_nearest_supported,
    iter_combinations,
)
from peftbench.distributed.engines import ENGINES
from peftbench.methods import METHODS
from peftbench.optim import OPTIMIZERS

_DEVICES = ("cuda", "cpu")


def render_markdown() -> str:
    """The table as a page: what runs, and each refusal with its reason."""
    notes: list[Rule] = []
    rows = [
        {"optimizer": f"`{optimizer}`", **{engine: _render_cell(engine, optimizer, notes) for engine in ENGINES}}
        for optimizer in OPTIMIZERS
    ]
    more = [
        {"knob": f"`{knob}`", **{engine: _render_optional_feature_cell(engine, extra, notes) for engine in ENGINES}}
        for extra, (knob, _) in OPTIONAL_FEATURES.items()
    ]
    reasons = "\n".join(
        f"{index}. {rule.reason}. {_describe_common_alternatives(rule)}" for index, rule in enumerate(notes, start=1)
    )
    changed = "\n".join(f"- `{name}`: {kind.approximation}." for name, kind in OPTIMIZERS.items() if kind.approximation)
    return _PAGE_TEMPLATE.format(
        methods=", ".join(f"`{name}`" for name in METHODS),
        table=tabulate(rows, headers="keys", tablefmt="github"),
        more=tabulate(more, headers="keys", tablefmt="github"),
        reasons=reasons,
        changed=changed,
    )


def _render_cell(engine: str, optimizer: str, footnotes: list[Rule]) -> str:
    """The precisions that run on a GPU, and numbers of the reasons why others do not, or not on CPU."""
    runs, refused = [], []
    for precision in PRECISIONS:
        points = [Combination(method, engine, optimizer, precision) for method in METHODS]
        for device in _DEVICES:
            rules = {find_blocking_rule(point, device) for point in points}
            assert len(rules) == 1, "a rule that tells methods apart needs a column for them"
            rule = rules.pop()
            if rule is None and device == "cuda":
                runs.append(precision)
            if rule is not None:
                refused.append(_footnote_number(rule, footnotes))
    return " ".join((*runs, *(f"[{number}]" for number in sorted(set(refused)))))


def _render_optional_feature_cell(engine: str, optional_feature: str, footnotes: list[Rule]) -> str:
    """Whether it goes with some of what runs on an engine, and numbers of the reasons why with others it does not."""
    rules = {
        find_blocking_rule(point, device)
        for device in _DEVICES
        for point in iter_combinations(engine, {optional_feature})
        if find_blocking_rule(Combination(point.method, engine, point.optimizer, point.precision), device) is None
    }
    numbers = sorted(_footnote_number(rule, footnotes) for rule in rules if rule is not None)
    return " ".join((*(["runs"] if None in rules else []), *(f"[{number}]" for number in numbers)))


def _footnote_number(rule: Rule, footnotes: list[Rule]) -> int:
    if rule not in footnotes:
        footnotes.append(rule)
    return footnotes.index(rule) + 1


def _describe_common_alternatives(rule: Rule) -> str:
    """What its refusals name most often in the place of what was asked for."""
    named: Counter[str] = Counter()
    for device in rule.devices or ("cuda",):
        for point in iter_combinations(optional_features={rule.optional_feature} if rule.optional_feature else ()):
            if find_blocking_rule(point, device) is rule:
                named.update(describe_changes(point, other, device) for other in find_nearest_supported(point, device))
    return "Most often: " + " or ".join(f"`{words}`" for words, _ in named.most_common(2)) + "."


_PAGE_TEMPLATE = """# What runs on what

Made by `make readme` from the table (`src/peftbench/distributed/compatibility.py`) that refuses a run before it loads
anything and from which the tests are made. All methods ({methods})
are alike in this, so each cell holds for all of them: the precisions that run on a GPU. A number tells why something
does not, or not on CPU; the refusal itself names the nearest that does run.

`make test-engines` (some 20 minutes on two cores) trains every combination that runs on CPU, in two processes where the
engine has them, and holds it against one process: the same losses and weights, to the tolerances in
`tests/distributed/tolerances.py`, and the same again when it is stopped at a checkpoint and goes on. (Weights rounded by
chance run in one process, and are held to learn and to go on identically.) `zero3_nvme` is run where libaio's
development files are. No test has run what needs a GPU (fp16, paged states, activation offload) so far.

{table}

What a recipe may ask for beside, with what runs above:

{more}

{reasons}

## What changes what is computed

All other optimizers do on every engine what they say. These approximate:

{changed}
"""


if __name__ == "__main__":
    print(render_markdown(), end="")  # noqa: T201
