"""The command line: compare, submit, status, estimate, fit, report, show."""

from __future__ import annotations

import gc
import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from peftbench.console import INTERRUPTED, guarded

if TYPE_CHECKING:
    from peftbench.budget.devices import DeviceFacts
    from peftbench.budget.world import World
    from peftbench.recipe import Recipe

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Which way of fine-tuning a causal language model fits your GPU, what it costs and what it brings.",
)  # fmt: skip

Overrides = Annotated[
    Optional[list[str]], typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Knobs to change, as train.steps=100.")
]

Configs = Annotated[Optional[list[Path]], typer.Option(help="A recipe; several are merged from left to right.")]
Budget = Annotated[Optional[str], typer.Option(help="Memory to fit, as 16GiB; default: budget.memory or the GPU's.")]
DeviceName = Annotated[Optional[str], typer.Option(help="A GPU that has a file, as t4, a10g or h100; or cpu.")]
Launcher = Annotated[
    Optional[Path], typer.Option("--accelerate", help="Accelerate config file: the plan is of one of its processes.")
]
Seeds = Annotated[
    Optional[int], typer.Option(min=1, help="Run what trains with so many seeds: its train.seed and the next ones.")
]
Processes = Annotated[Optional[int], typer.Option(min=1, help="How many there are; default: what the file says.")]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@app.command()
def compare(
    suite: Annotated[Path, typer.Argument(help="A suite: recipes, and knobs to vary.")],
    overrides: Overrides = None,
    out: Annotated[Optional[Path], typer.Option(help="Folder for the runs; default: what the recipes say.")] = None,
    accelerate: Annotated[
        Optional[Path], typer.Option(help="Accelerate config file, as accel_configs/cpu2.yaml; default: the suite's.")
    ] = None,
    seeds: Seeds = None,
) -> None:
    """Run every recipe of a suite in a fresh process and print the comparison. Finished runs are skipped."""
    from peftbench.errors import MissingFileError
    from peftbench.finished import record_of
    from peftbench.record import FILE
    from peftbench.report.command import show_report
    from peftbench.report.files import write_report
    from peftbench.report.page.content import Unfinished
    from peftbench.suite.expand import accelerate_config, expand, read_suite
    from peftbench.suite.local import run_suite

    with guarded():
        recipes = expand(suite, overrides or [], out, seeds)
        title = read_suite(suite).name
        launcher = accelerate or accelerate_config(suite)
        if launcher is not None and not launcher.is_file():
            raise MissingFileError(f"there is no accelerate config {launcher}", "accel_configs/ has some")
        try:
            results = run_suite(recipes, launcher, _say)
        except KeyboardInterrupt:
            _say("interrupted: finished runs are kept; run the same command again to go on with the others")
            raise typer.Exit(INTERRUPTED) from None
        places = {Path(recipe.output_dir) / recipe.name / FILE: record_of(recipe) for recipe in recipes}
        records = {path: record for path, record in places.items() if record is not None}
        bad = [result for result in results if not result.well]
        if records:
            there = {record.name for record in records.values()}
            left = [
                Unfinished(one.name, one.outcome, one.shared or one.error or "")
                for one in bad if one.name not in there
            ]  # fmt: skip
            written = write_report(records, Path(recipes[0].output_dir), title, unfinished=left)
            show_report(written, title)
        for result in bad:
            _say(f"{result.name}: {result.outcome}" + (f": {result.error}" if result.error else ""))
        if bad:
            raise typer.Exit(1)


@app.command()
def report(
    folder: Annotated[Optional[Path], typer.Argument(help="Folder that a run or a suite wrote to.")] = None,
    html: Annotated[
        Optional[Path],
        typer.Option(help="Where the page goes; default: report.html there, none of --compare."),
    ] = None,
    into: Annotated[
        Optional[Path], typer.Option(help="Markdown file whose block named by --block is replaced by the table.")
    ] = None,
    block: Annotated[
        Optional[str], typer.Option(help="The block: between <!-- report:NAME --> and its end; default: table.")
    ] = None,
    by: Annotated[
        Optional[str], typer.Option(help="Show held-out loss by this knob's values, as optimizer.learning_rate.")
    ] = None,
    price_per_hour: Annotated[
        Optional[float], typer.Option(min=0.0, help="What one device costs an hour, instead of what the recipes say.")
    ] = None,
    sides: Annotated[
        Optional[tuple[Path, Path]],
        typer.Option("--compare", metavar="A B", help="Two such folders instead, before and after, side by side."),
    ] = None,
    threshold: Annotated[
        Optional[list[str]],
        typer.Option(metavar="[FIGURE=]PERCENT", help="How much worse B may be, as 5% or rougeL=2%; default: 5%."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison of A and B as JSON.")] = False,
) -> None:
    """Make the page and the tables, from what lies below a folder; or hold two folders against each other."""
    from peftbench.errors import REGRESSED
    from peftbench.report.command import (
        compare_folders,
        one_folder,
        records_of,
        refuse_unused,
        show_part,
        show_report,
    )

    with guarded():
        if sides is not None:
            others = {"--into": into, "--block": block, "--by": by, "--price-per-hour": price_per_hour}
            if fallen := compare_folders(sides, threshold or [], as_json, html, {"FOLDER": folder, **others}):
                _say(fallen)
                raise typer.Exit(REGRESSED)
            return
        folder = one_folder(folder, {"--threshold": threshold, "--json": as_json or None})
        refuse_unused(html, into, block, by)
        if into is not None or by is not None:
            show_part(list(records_of(folder, price_per_hour, may_be_none=False).values()), into, block, by)
            return
        # Only a page needs these, and they take a second.
        from peftbench.report.files import write_report
        from peftbench.report.page.content import Unfinished
        from peftbench.suite.standing import unfinished

        left = [Unfinished(row.name, row.state, row.said) for row in unfinished(folder)]
        records, title = records_of(folder, price_per_hour, may_be_none=bool(left)), folder.resolve().name
        show_report(write_report(records, folder, title, html=html, unfinished=left), title)


def _facts(device: str | None) -> DeviceFacts:
    from peftbench.budget.devices import UNKNOWN, device_named

    return device_named(device) if device else UNKNOWN


def _budget(given: str | None, facts: DeviceFacts, recipe: Recipe) -> int | None:
    """What a recipe is to fit: what the command says, else what the recipe does, else what the device has."""
    from peftbench.errors import BudgetError
    from peftbench.sizes import parse_size

    there = int(facts.memory)
    size = recipe.budget.memory_bytes if given is None else parse_size(given)
    if size is not None and there and size > there:
        raise BudgetError(f"a budget of {size:,} bytes is more than the {there:,} of {facts.torch_name}; give less")
    return size or there or None


def _world(launcher: Path | None, processes: int | None, recipe: Recipe) -> World:
    """The processes that a plan is of."""
    from peftbench.budget.search import with_micro_batch
    from peftbench.budget.world import ALONE, world_of
    from peftbench.errors import BudgetError

    if launcher is None and processes is not None:
        raise BudgetError("--processes needs an engine that spreads a training over them; give --accelerate too")
    # Of which size a micro-batch is may be what is asked, and says nothing of where it runs.
    return ALONE if launcher is None else world_of(launcher, processes, with_micro_batch(recipe, 1))


@app.command()
def submit(
    target: Annotated[Path, typer.Argument(metavar="SUITE_OR_RECIPE", help="A suite or a recipe.")],
    overrides: Overrides = None,
    engine: Annotated[
        Optional[str],
        typer.Option(help="Of accel_configs/, as zero2, or a file; default: the suite's, or one process."),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines of each run.")] = 1,
    gpus_per_node: Annotated[
        Optional[int], typer.Option(min=0, help="GPUs of each; default: what the engine's file says, or 1; 0 for CPUs.")
    ] = None,
    at_once: Annotated[Optional[int], typer.Option(min=1, help="Runs under way together; default: all.")] = None,
    restarts: Annotated[int, typer.Option(min=0, help="How often a job out of time begins anew.")] = 10,
    seeds: Seeds = None,
    out: Annotated[Optional[Path], typer.Option(help="Folder for the runs; default: what the recipes say.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write everything, print the script, submit nothing.")
    ] = False,
) -> None:
    """Submit a suite to SLURM as one job array, or a recipe as one job. slurm.OPTION=VALUE is for sbatch."""
    from peftbench.slurm.submit import prepare
    from peftbench.slurm.submit import submit as hand_in
    from peftbench.suite.jobs import followed, jobs_of, left_out

    with guarded():
        given = overrides or []
        options = [word.removeprefix("slurm.") for word in given if word.startswith("slurm.")]
        asked = jobs_of(
            target, [word for word in given if not word.startswith("slurm.")], options, out=out, engine=engine,
            nodes=nodes, gpus_per_node=gpus_per_node, at_once=at_once, restarts=restarts, seeds=seeds,
        )  # fmt: skip
        for line in left_out(asked):
            _say(line)
        if not asked.recipes:
            print("nothing is left to submit")
            return
        prepared = prepare(asked.recipes, asked.job, asked.engine, asked.place)
        if dry_run:
            print(prepared.text)
            return
        print(followed(hand_in(prepared)))


@app.command()
def status(
    folder: Annotated[Path, typer.Argument(help="Folder that a run or a suite writes to.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say how every run below a folder stands: waiting, running, finished, preempted, failed or gone."""
    from dataclasses import asdict

    from peftbench.errors import SlurmError
    from peftbench.slurm.queue import Queued, queued
    from peftbench.suite.standing import standings, table

    with guarded():
        queue: dict[str, Queued] = {}
        try:
            queue = queued()
        except SlurmError as error:
            _say(f"from the files alone, for {error.message}")
        rows = standings(folder, queue)
        print(json.dumps([asdict(row) for row in rows], indent=1) if as_json else table(rows))


@app.command()
def estimate(
    changes: Overrides = None,
    config: Configs = None,
    suite: Annotated[Optional[Path], typer.Option(help="Instead of a recipe: a line for every run of a suite.")] = None,
    budget: Budget = None,
    device: DeviceName = None,
    accelerate: Launcher = None,
    processes: Processes = None,
    into: Annotated[Optional[Path], typer.Option(help="Markdown file with a block to replace by it.")] = None,
    block: Annotated[str, typer.Option(help="The block: between <!-- report:NAME --> and its end.")] = "plan",
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Say how much GPU memory a recipe would take, and whether it fits, without a GPU and without weights."""
    from peftbench.config import load_recipe
    from peftbench.console import quiet_libraries
    from peftbench.errors import BudgetError
    from peftbench.imports import quick_imports
    from peftbench.suite.expand import accelerate_config, expand

    with guarded():
        facts = _facts(device)
        if suite is not None and config:
            raise BudgetError("--suite says which recipes it is of; leave --config out")
        recipes = [load_recipe(config or [], changes or [])] if suite is None else expand(suite, changes or [])
        accelerate = accelerate or (accelerate_config(suite) if suite else None)
        with quick_imports():
            quiet_libraries()
            from tqdm.auto import tqdm

            from peftbench.budget.search import Room, plan_of
            from peftbench.report.plan import plan_text, plans_text
            from peftbench.report.table import insert_block
        gc.freeze()  # what is imported stays, and is not looked through again when the process ends

        def room(recipe: Recipe) -> Room:
            size = _budget(budget, facts, recipe)
            return Room(facts, device or facts.torch_name, size, _world(accelerate, processes, recipe))

        if suite is None:
            plan = room(recipes[0]).plan(recipes[0])
            made = plan.model_dump_json(indent=1) if as_json else plan_text(plan)
        else:
            bar = tqdm(recipes, desc="rehearsing", unit="run", disable=None)
            plans = [plan_of(recipe, partial(room, recipe)) for recipe in bar]
            made = json.dumps([plan.model_dump() for plan in plans], indent=1) if as_json else plans_text(plans)
        if into is not None:
            insert_block(made, into, block)
        else:
            print(made)


@app.command()
def fit(
    changes: Overrides = None,
    config: Configs = None,
    budget: Budget = None,
    device: DeviceName = None,
    accelerate: Launcher = None,
    processes: Processes = None,
    allow: Annotated[
        str, typer.Option(help="Ways of saving memory to try, as checkpointing,bf16,adamw8bit; or all.")
    ] = "checkpointing",
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Run the first answer and the next larger micro-batch here."),
    ] = False,
    family: Annotated[
        Optional[str],
        typer.Option("--largest-model", metavar="FAMILY", help="Find the largest of gpt2, llama3 or qwen2.5."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
) -> None:
    """Find the largest micro-batch that fits, with each set of allowed ways of saving memory."""
    from peftbench.budget.plan import Fit
    from peftbench.config import load_recipe
    from peftbench.console import quiet_libraries
    from peftbench.errors import OutOfRangeError

    with guarded():
        facts = _facts(device)
        if verify and family is not None:
            raise OutOfRangeError("--verify runs the recipe's own model; leave --largest-model out")
        recipe = load_recipe(config or [], changes or [])
        quiet_libraries()
        from peftbench.budget.search import Room, largest_model, strategies
        from peftbench.report.plan import fit_text
        from peftbench.suite.local import run_one
        from peftbench.suite.verify import check_here, prove

        if verify:
            check_here(facts)
        size = _budget(budget, facts, recipe)
        room = Room(facts, device or facts.torch_name, size, _world(accelerate, processes, recipe))
        if family is not None:
            answer = Fit(budget_bytes=room.needed, models=largest_model(recipe, family, allow, room))
        else:
            answer = Fit(budget_bytes=room.needed, strategies=strategies(recipe, allow, room))
        if verify and answer.strategies:
            launch = partial(run_one, accelerate=accelerate, processes=processes)
            proof = prove(recipe, answer.strategies[0], room, launch=launch, say=_say)
            answer = answer.model_copy(update={"proof": proof})
        print(answer.model_dump_json(indent=1) if as_json else fit_text(answer))
        if not answer.fits:
            raise typer.Exit(1)


@app.command()
def show(
    recipe: Annotated[
        Optional[list[str]],
        typer.Argument(metavar="RECIPE.yaml [KEY.SUB=VALUE]...", help="Files and changes, from left to right."),
    ] = None,
    glossary: Annotated[bool, typer.Option("--glossary", help="Print what each column of the tables means.")] = False,
) -> None:
    """Print the resolved recipe with each knob's one-line meaning, or the tables' glossary."""
    from peftbench.config import explained, load_recipe
    from peftbench.report.columns import COLUMNS

    recipe = recipe or []
    with guarded():
        if glossary:
            print("\n".join(f"{column.title}: {column.meaning}" for column in COLUMNS))
            return
        changes = [word for word in recipe if "=" in word and not Path(word).is_file()]  # a run's folder may hold a "="
        print(explained(load_recipe([Path(word) for word in recipe if word not in changes], changes)), end="")


def main() -> None:
    """Run the command line."""
    app()
