"""Which method, optimizer and precision runs on which engine: one table, from which the tests and the docs are made.

Whatever no rule refuses is run by the tests (tests/engines/), two processes where the engine spreads over several.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from peftbench.engine.engines import ENGINES
from peftbench.errors import CombinationError
from peftbench.methods import METHODS
from peftbench.optim import OPTIMIZERS

OVER_A_FROZEN_BASE = frozenset({"lora", "prompt_tuning"})
"""Methods that add to the base and change nothing of it."""
PRECISIONS = ("fp32", "bf16", "fp16")
_ZERO = frozenset(name for name, kind in ENGINES.items() if kind.deepspeed)
_OFFLOAD = frozenset(name for name, kind in ENGINES.items() if kind.offload_optimizer != "none")
_8BIT = frozenset({"adamw8bit", "paged_adamw8bit", "lion8bit"})
_ROUNDED = frozenset(name for name, kind in OPTIMIZERS.items() if kind.weights == "bf16")
_BITSANDBYTES = _8BIT | {"adamw32bit", "lion"}


@dataclass(frozen=True)
class Combination:
    """One point of the table."""

    method: str
    engine: str
    optimizer: str
    precision: str

    @property
    def name(self) -> str:
        """Of the four, fit for a folder."""
        return f"{self.method}-{self.optimizer}-{self.precision}"


@dataclass(frozen=True)
class Rule:
    """What is refused. A set that is None holds everything."""

    reason: str
    instead: str
    """The nearest thing that works."""
    engines: frozenset[str] | None = None
    optimizers: frozenset[str] | None = None
    precisions: frozenset[str] | None = None
    devices: frozenset[str] | None = None

    def refuses(self, combination: Combination, device: str) -> bool:
        """Whether it speaks of this combination on this kind of device."""
        return all(
            allowed is None or value in allowed
            for value, allowed in (
                (combination.engine, self.engines), (combination.optimizer, self.optimizers),
                (combination.precision, self.precisions), (device, self.devices),
            )
        )  # fmt: skip


RULES = (
    Rule(
        "the optimizer is shown one flat vector of each process's part, and this one needs the matrices",
        "optimizer.kind=adamw8bit, or accel_configs/ddp.yaml or single_gpu.yaml",
        engines=_ZERO, optimizers=frozenset(name for name, kind in OPTIMIZERS.items() if kind.needs_matrices),
    ),
    Rule(
        "each process holds some rows of a matrix, of which a projection or a row's mean is another",
        "optimizer.kind=adamw, or accel_configs/ddp.yaml",
        engines=frozenset({"fsdp2"}),
        optimizers=frozenset(name for name, kind in OPTIMIZERS.items() if kind.needs_matrices),
    ),
    Rule(
        "weights in bf16 are rounded by chance, by each process otherwise, and ZeRO steps copies in float32",
        "optimizer.kind=adamw8bit, or accel_configs/single_gpu.yaml",
        engines=frozenset(ENGINES) - {"single"},
        optimizers=_ROUNDED,
    ),
    Rule(
        "it holds weights in bf16, of which other arithmetic would make copies",
        "train.precision=bf16",
        optimizers=_ROUNDED,
        precisions=frozenset({"fp32", "fp16"}),
    ),
    Rule(
        "bitsandbytes' kernels do not take torch's sharded tensors",
        "optimizer.kind=adamw, or accel_configs/zero2.yaml",
        engines=frozenset({"fsdp2"}), optimizers=_BITSANDBYTES,
    ),
    Rule(
        "DeepSpeedCPUAdam steps states in the CPU's memory, and this engine has them on the device",
        "optimizer.kind=adamw, or accel_configs/zero2_offload.yaml",
        engines=frozenset(ENGINES) - _OFFLOAD, optimizers=frozenset({"deepspeed_cpu_adam"}),
    ),
    Rule(
        "states on a disk are read and written by DeepSpeed's own Adam",
        "optimizer.kind=deepspeed_cpu_adam, or accel_configs/zero3_offload.yaml",
        engines=frozenset({"zero3_nvme"}), optimizers=frozenset(OPTIMIZERS) - {"deepspeed_cpu_adam"},
    ),
    Rule(
        "paged states lie in memory that a GPU's driver moves, and there is none on CPU",
        "optimizer.kind=adamw8bit",
        optimizers=frozenset({"paged_adamw8bit"}), devices=frozenset({"cpu"}),
    ),
    Rule(
        "paged states lie in the GPU's memory or where its driver moves them, and offload puts them elsewhere",
        "optimizer.kind=adamw8bit, or accel_configs/zero2.yaml",
        engines=_OFFLOAD, optimizers=frozenset({"paged_adamw8bit"}),
    ),
    Rule(
        "fp16 is GPU arithmetic",
        "train.precision=bf16",
        precisions=frozenset({"fp16"}), devices=frozenset({"cpu"}),
    ),
    Rule(
        "DeepSpeed's fp16 holds weights in fp16, and the recipe's keeps them in float32",
        "train.precision=bf16, or accel_configs/ddp.yaml",
        engines=_ZERO, precisions=frozenset({"fp16"}),
    ),
)  # fmt: skip
"""In the order in which they are asked; the first that refuses explains."""


def refusal(combination: Combination, device: str) -> Rule | None:
    """The rule that refuses this combination on a device of this kind (cuda or cpu), None where it runs."""
    return next((rule for rule in RULES if rule.refuses(combination, device)), None)


def check(combination: Combination, device: str) -> None:
    """Refuse before anything is loaded.

    Raises:
        CombinationError: it cannot run; says why, and what can.
    """
    rule = refusal(combination, device)
    if rule is not None:
        raise CombinationError(
            f"{combination.method} with optimizer.kind={combination.optimizer} in {combination.precision} does not run "
            f"on {combination.engine}: {rule.reason}; use {rule.instead}"
        )


def check_base(method: str, engine: str, quantization: str | None) -> None:
    """Refuse a quantised base before it is loaded, where it would be trained or shared out.

    Raises:
        CombinationError: it cannot run; says why, and what can.
    """
    if quantization is None:
        return
    if method not in OVER_A_FROZEN_BASE:
        raise CombinationError(
            f"model.quantization={quantization} holds the base in values that cannot be trained, and {method} trains "
            f"them; use method.kind={' or '.join(sorted(OVER_A_FROZEN_BASE))}, or leave model.quantization null"
        )
    if ENGINES[engine].shards_weights:
        raise CombinationError(
            f"{engine} shares weights out in parts, and those of a quantised base belong together; use "
            "accel_configs/ddp.yaml or zero2.yaml, or leave model.quantization null"
        )


def check_checkpoint(engine: str, optimizer: str) -> None:
    """Refuse to write checkpoints where a training could not go on from them.

    Raises:
        CombinationError: the states lie where they are not read from.
    """
    if ENGINES[engine].on_disk:
        raise CombinationError(
            f"{engine} keeps states on a disk, and a checkpoint does not hold them; leave checkpoint.every_steps null, "
            "or use accel_configs/zero3_offload.yaml"
        )
    if optimizer == "paged_adamw8bit":
        raise CombinationError(
            "states of paged_adamw8bit would come back unpaged; leave checkpoint.every_steps null, or use "
            "optimizer.kind=adamw8bit"
        )


def combinations(engine: str | None = None) -> Iterator[Combination]:
    """Every point of the table, or those of one engine."""
    engines = ENGINES if engine is None else (engine,)
    for point in itertools.product(METHODS, engines, OPTIMIZERS, PRECISIONS):
        yield Combination(*point)


def markdown() -> str:
    """The table as a page: what runs, and each refusal with its reason."""
    from tabulate import tabulate

    rows = []
    notes: list[Rule] = []
    for optimizer in OPTIMIZERS:
        row = {"optimizer": f"`{optimizer}`"}
        for engine in ENGINES:
            row[engine] = _cell(engine, optimizer, notes)
        rows.append(row)
    table = tabulate(rows, headers="keys", tablefmt="github")
    reasons = "\n".join(f"{index}. {rule.reason}. Use {rule.instead}." for index, rule in enumerate(notes, start=1))
    changed = "\n".join(
        f"- `{name}`: {kind.changes_trajectory}." for name, kind in OPTIMIZERS.items() if kind.changes_trajectory
    )
    return _PAGE.format(
        methods=", ".join(f"`{name}`" for name in METHODS), table=table, reasons=reasons, changed=changed
    )


def _cell(engine: str, optimizer: str, notes: list[Rule]) -> str:
    """The precisions that run on a GPU, and numbers of the reasons why others do not, or not on CPU."""
    runs, refused = [], []
    for precision in PRECISIONS:
        points = [Combination(method, engine, optimizer, precision) for method in METHODS]
        for device in ("cuda", "cpu"):
            rules = {refusal(point, device) for point in points}
            assert len(rules) == 1, "a rule that tells methods apart needs a column for them"
            rule = rules.pop()
            if rule is None and device == "cuda":
                runs.append(precision)
            if rule is not None and rule not in notes:
                notes.append(rule)
            if rule is not None and (number := notes.index(rule) + 1) not in refused:
                refused.append(number)
    marks = " ".join(f"[{number}]" for number in sorted(refused))
    return f"{' '.join(runs)} {marks}".strip()


_PAGE = """# What runs on what

Made by `python -m peftbench.engine.compatibility`, from the same table (`src/peftbench/engine/compatibility.py`) that
refuses a run before it loads anything and from which the tests are made. Every method ({methods}) is alike in this, so
each cell holds for all of them: the precisions that run on a GPU. A number tells why something does not, or not on CPU.

`make test-engines` trains every combination that runs on CPU, in two processes, and holds it against one process: the
same losses and weights, to the tolerances in `tests/engines/tolerances.py`, and the same again when it is stopped at a
checkpoint and goes on. `zero3_nvme` is run where libaio's development files are, and writes no checkpoints. No test has
run what needs a GPU (fp16, paged states) so far.

{table}

{reasons}

## What changes what is computed

All other optimizers do on every engine what they say. These approximate:

{changed}
"""


if __name__ == "__main__":
    print(markdown(), end="")  # noqa: T201
