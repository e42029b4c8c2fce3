"""The command line: compare, submit, status, estimate, fit, report, show."""

from __future__ import annotations

import gc
import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from peftbench.common.console import INTERRUPT_EXIT_CODE, cli_errors

if TYPE_CHECKING:
    from peftbench.memory.devices import DeviceFacts
    from peftbench.memory.launch_config import LaunchConfig
    from peftbench.recipe.schema import Recipe

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Which way of fine-tuning a causal language model fits your GPU, what it costs and what it brings.",
)

OverridesArgument = Annotated[
    Optional[list[str]], typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Knobs to change, as train.steps=100.")
]

ConfigOption = Annotated[Optional[list[Path]], typer.Option(help="A recipe; several are merged from left to right.")]
BudgetOption = Annotated[
    Optional[str], typer.Option(help="Memory to fit, as 16GiB; default: budget.memory or the GPU's.")
]
DeviceOption = Annotated[Optional[str], typer.Option(help="A GPU that has a file, as t4, a10g or h100; or cpu.")]
AccelerateOption = Annotated[
    Optional[Path], typer.Option("--accelerate", help="Accelerate config file: the plan is of one of its processes.")
]
SeedsOption = Annotated[
    Optional[int], typer.Option(min=1, help="Run what trains with so many seeds: its train.seed and the next ones.")
]
ProcessesOption = Annotated[Optional[int], typer.Option(min=1, help="How many there are; default: what the file says.")]


def _print_to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@app.command()
def compare(
    suite: Annotated[Path, typer.Argument(help="A suite: recipes, and knobs to vary.")],
    overrides: OverridesArgument = None,
    out: Annotated[Optional[Path], typer.Option(help="Folder for the runs; default: what the recipes say.")] = None,
    accelerate: Annotated[
        Optional[Path], typer.Option(help="Accelerate config file, as accel_configs/cpu2.yaml; default: the suite's.")
    ] = None,
    seeds: SeedsOption = None,
) -> None:
    """Run every recipe of a suite in a fresh process and print the comparison. Finished runs are skipped."""
    from peftbench.cli.report import print_report
    from peftbench.errors import MissingFileError
    from peftbench.report.page.content import UnfinishedRun
    from peftbench.report.writer import write_report
    from peftbench.run_dir.layout import RunDir
    from peftbench.run_dir.results import load_matching_record
    from peftbench.suite.expand import expand, read_suite, resolve_accelerate_config
    from peftbench.suite.launch import run_suite

    with cli_errors():
        recipes = expand(suite, overrides or [], out, seeds)
        title = read_suite(suite).name
        launcher = accelerate or resolve_accelerate_config(suite)
        if launcher is not None and not launcher.is_file():
            raise MissingFileError(f"there is no accelerate config {launcher}", "accel_configs/ has some")
        try:
            results = run_suite(recipes, launcher, _print_to_stderr)
        except KeyboardInterrupt:
            _print_to_stderr("interrupted: finished runs are kept; run the same command again to go on with the others")
            raise typer.Exit(INTERRUPT_EXIT_CODE) from None
        places = {RunDir.from_recipe(recipe).record_file: load_matching_record(recipe) for recipe in recipes}
        records = {path: record for path, record in places.items() if record is not None}
        bad = [result for result in results if not result.succeeded]
        if records:
            there = {record.name for record in records.values()}
            left = [
                UnfinishedRun(one.name, one.outcome, one.shareable_error or one.error or "")
                for one in bad
                if one.name not in there
            ]
            written = write_report(records, Path(recipes[0].output_dir), title, unfinished_runs=left)
            print_report(written, title)
        for result in bad:
            _print_to_stderr(f"{result.name}: {result.outcome}" + (f": {result.error}" if result.error else ""))
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
    from peftbench.cli.report import (
        compare_folders,
        load_records,
        print_report,
        print_section,
        reject_unused_options,
        require_folder,
    )
    from peftbench.errors import REGRESSION_EXIT_CODE

    with cli_errors():
        if sides is not None:
            others = {"--into": into, "--block": block, "--by": by, "--price-per-hour": price_per_hour}
            if fallen := compare_folders(sides, threshold or [], as_json, html, {"FOLDER": folder, **others}):
                _print_to_stderr(fallen)
                raise typer.Exit(REGRESSION_EXIT_CODE)
            return
        folder = require_folder(folder, {"--threshold": threshold, "--json": as_json or None})
        reject_unused_options(html, into, block, by)
        if into is not None or by is not None:
            print_section(list(load_records(folder, price_per_hour, allow_empty=False).values()), into, block, by)
            return
        # Only a page needs these, and they take a second.
        from peftbench.report.page.content import UnfinishedRun
        from peftbench.report.writer import write_report
        from peftbench.suite.status import find_unfinished_runs

        left = [UnfinishedRun(row.name, row.state, row.detail) for row in find_unfinished_runs(folder)]
        records, title = load_records(folder, price_per_hour, allow_empty=bool(left)), folder.resolve().name
        print_report(write_report(records, folder, title, page_path=html, unfinished_runs=left), title)


def _load_device_facts(device: str | None) -> DeviceFacts:
    from peftbench.memory.devices import UNKNOWN_DEVICE, get_device_facts

    return get_device_facts(device) if device else UNKNOWN_DEVICE


def _resolve_budget(requested: str | None, facts: DeviceFacts, recipe: Recipe) -> int | None:
    """What a recipe is to fit: what the command says, else what the recipe does, else what the device has."""
    from peftbench.common.units import parse_size
    from peftbench.errors import BudgetError

    there = int(facts.memory)
    size = recipe.budget.memory_bytes if requested is None else parse_size(requested)
    if size is not None and there and size > there:
        raise BudgetError(f"a budget of {size:,} bytes is more than the {there:,} of {facts.torch_name}; give less")
    return size or there or None


def _build_launch_config(accelerate_config: Path | None, processes: int | None, recipe: Recipe) -> LaunchConfig:
    """The processes that a plan is of."""
    from peftbench.errors import BudgetError
    from peftbench.memory.launch_config import SINGLE_PROCESS, load_launch_config
    from peftbench.memory.search import with_micro_batch

    if accelerate_config is None and processes is not None:
        raise BudgetError("--processes needs an engine that spreads a training over them; give --accelerate too")
    # Of which size a micro-batch is may be what is asked, and says nothing of where it runs.
    return (
        SINGLE_PROCESS
        if accelerate_config is None
        else load_launch_config(accelerate_config, processes, with_micro_batch(recipe, 1))
    )


@app.command()
def submit(
    target: Annotated[Path, typer.Argument(metavar="SUITE_OR_RECIPE", help="A suite or a recipe.")],
    overrides: OverridesArgument = None,
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
    seeds: SeedsOption = None,
    out: Annotated[Optional[Path], typer.Option(help="Folder for the runs; default: what the recipes say.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write everything, print the script, submit nothing.")
    ] = False,
) -> None:
    """Submit a suite to SLURM as one job array, or a recipe as one job. slurm.OPTION=VALUE is for sbatch."""
    from peftbench.slurm.submit import prepare_submission
    from peftbench.slurm.submit import submit_job as hand_in
    from peftbench.suite.slurm_jobs import describe_next_steps, describe_skipped_runs, plan_submission

    with cli_errors():
        given = overrides or []
        options = [word.removeprefix("slurm.") for word in given if word.startswith("slurm.")]
        asked = plan_submission(
            target,
            [word for word in given if not word.startswith("slurm.")],
            options,
            out=out,
            engine=engine,
            nodes=nodes,
            gpus_per_node=gpus_per_node,
            max_parallel=at_once,
            max_requeues=restarts,
            seeds=seeds,
        )
        for line in describe_skipped_runs(asked):
            _print_to_stderr(line)
        if not asked.recipes:
            print("nothing is left to submit")
            return
        prepared = prepare_submission(asked.recipes, asked.job, asked.launch_file, asked.script_dir)
        if dry_run:
            print(prepared.script_text)
            return
        print(describe_next_steps(hand_in(prepared)))


@app.command()
def status(
    folder: Annotated[Path, typer.Argument(help="Folder that a run or a suite writes to.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say how every run below a folder stands: waiting, running, finished, preempted, failed or gone."""
    from dataclasses import asdict

    from peftbench.errors import SlurmError
    from peftbench.slurm.queue import QueuedJob, list_queued_jobs
    from peftbench.suite.status import collect_run_statuses, render_status_table

    with cli_errors():
        queue: dict[str, QueuedJob] = {}
        try:
            queue = list_queued_jobs()
        except SlurmError as error:
            _print_to_stderr(f"from the files alone, for {error.message}")
        rows = collect_run_statuses(folder, queue)
        print(json.dumps([asdict(row) for row in rows], indent=1) if as_json else render_status_table(rows))


@app.command()
def estimate(
    changes: OverridesArgument = None,
    config: ConfigOption = None,
    suite: Annotated[Optional[Path], typer.Option(help="Instead of a recipe: a line for every run of a suite.")] = None,
    budget: BudgetOption = None,
    device: DeviceOption = None,
    accelerate: AccelerateOption = None,
    processes: ProcessesOption = None,
    into: Annotated[Optional[Path], typer.Option(help="Markdown file with a block to replace by it.")] = None,
    block: Annotated[str, typer.Option(help="The block: between <!-- report:NAME --> and its end.")] = "plan",
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Say how much GPU memory a recipe would take, and whether it fits, without a GPU and without weights."""
    from peftbench.common.console import quiet_libraries
    from peftbench.common.libraries import imports_without_gc
    from peftbench.errors import BudgetError
    from peftbench.recipe.loader import load_recipe
    from peftbench.suite.expand import expand, resolve_accelerate_config

    with cli_errors():
        facts = _load_device_facts(device)
        if suite is not None and config:
            raise BudgetError("--suite says which recipes it is of; leave --config out")
        recipes = [load_recipe(config or [], changes or [])] if suite is None else expand(suite, changes or [])
        accelerate = accelerate or (resolve_accelerate_config(suite) if suite else None)
        with imports_without_gc():
            quiet_libraries()
            from tqdm.auto import tqdm

            from peftbench.memory.search import MemoryTarget, plan_run
            from peftbench.report.tables.memory_plan import format_plan, format_plans
            from peftbench.report.tables.table import insert_block
        gc.freeze()  # what is imported stays, and is not looked through again when the process ends

        def room(recipe: Recipe) -> MemoryTarget:
            size = _resolve_budget(budget, facts, recipe)
            return MemoryTarget(
                facts, device or facts.torch_name, size, _build_launch_config(accelerate, processes, recipe)
            )

        if suite is None:
            plan = room(recipes[0]).plan(recipes[0])
            made = plan.model_dump_json(indent=1) if as_json else format_plan(plan)
        else:
            bar = tqdm(recipes, desc="rehearsing", unit="run", disable=None)
            plans = [plan_run(recipe, partial(room, recipe)) for recipe in bar]
            made = json.dumps([plan.model_dump() for plan in plans], indent=1) if as_json else format_plans(plans)
        if into is not None:
            insert_block(made, into, block)
        else:
            print(made)


@app.command()
def fit(
    changes: OverridesArgument = None,
    config: ConfigOption = None,
    budget: BudgetOption = None,
    device: DeviceOption = None,
    accelerate: AccelerateOption = None,
    processes: ProcessesOption = None,
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
    from peftbench.common.console import quiet_libraries
    from peftbench.errors import OutOfRangeError
    from peftbench.memory.plan import Fit
    from peftbench.recipe.loader import load_recipe

    with cli_errors():
        facts = _load_device_facts(device)
        if verify and family is not None:
            raise OutOfRangeError("--verify runs the recipe's own model; leave --largest-model out")
        recipe = load_recipe(config or [], changes or [])
        quiet_libraries()
        from peftbench.memory.search import MemoryTarget, find_largest_model, strategies
        from peftbench.report.tables.memory_plan import format_fit
        from peftbench.suite.launch import run_one
        from peftbench.suite.verify_fit import check_local_device, verify_strategy

        if verify:
            check_local_device(facts)
        size = _resolve_budget(budget, facts, recipe)
        room = MemoryTarget(
            facts, device or facts.torch_name, size, _build_launch_config(accelerate, processes, recipe)
        )
        if family is not None:
            answer = Fit(budget_bytes=room.required_budget, models=find_largest_model(recipe, family, allow, room))
        else:
            answer = Fit(budget_bytes=room.required_budget, strategies=strategies(recipe, allow, room))
        if verify and answer.strategies:
            launch = partial(run_one, accelerate=accelerate, processes=processes)
            proof = verify_strategy(recipe, answer.strategies[0], room, launch=launch, log_message=_print_to_stderr)
            answer = answer.model_copy(update={"proof": proof})
        print(answer.model_dump_json(indent=1) if as_json else format_fit(answer))
        if not answer.has_fit:
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
    from peftbench.recipe.loader import load_recipe, to_commented_yaml
    from peftbench.report.tables.columns import COLUMNS

    recipe = recipe or []
    with cli_errors():
        if glossary:
            print("\n".join(f"{column.title}: {column.description}" for column in COLUMNS))
            return
        changes = [word for word in recipe if "=" in word and not Path(word).is_file()]  # a run's folder may hold a "="
        print(to_commented_yaml(load_recipe([Path(word) for word in recipe if word not in changes], changes)), end="")


def main() -> None:
    """Run the command line."""
    app()
