"""The commands ``report`` and ``compare``: tables and pages from the records of finished runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from peftbench.cli.options import JsonOption, UpdateFileOption, print_to_stderr
from peftbench.common.console import cli_errors


def report(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Output folder of a run or a suite.")],
    html: Annotated[Optional[Path], typer.Option(help="Path of the page. Default: report.html in FOLDER.")] = None,
    open_page: Annotated[bool, typer.Option("--open", metavar="", help="Open the page in a browser.")] = False,
    update_file: UpdateFileOption = None,
    marker: Annotated[
        Optional[str],
        typer.Option(
            help="Name of the section, which starts with <!-- report:NAME --> and ends with "
            "<!-- end of report:NAME -->. Default: table."
        ),
    ] = None,
    group_by: Annotated[
        Optional[str], typer.Option(help="Tabulate held-out loss by the values of a recipe key, e.g. train.seed.")
    ] = None,
    price_per_hour: Annotated[
        Optional[float], typer.Option(min=0.0, help="Price of one device per hour. Default: the recipe's.")
    ] = None,
) -> None:
    """Build the HTML page and the tables from the records in a folder."""
    from peftbench.cli.report_actions import (
        load_records,
        open_in_browser,
        print_report,
        print_section,
        reject_unused_options,
    )

    with cli_errors():
        reject_unused_options(html, update_file, marker, group_by, open_page=open_page)
        if update_file is not None or group_by is not None:
            records = load_records(folder, price_per_hour, allow_empty=False)
            print_section(list(records.values()), update_file, marker, group_by)
            return
        # Imported here because only a page needs them, and the import takes a second.
        from peftbench.report.page.content import UnfinishedRun
        from peftbench.report.writer import write_report
        from peftbench.suite.status import UNREADABLE_STATE, find_unfinished_runs

        unfinished = [UnfinishedRun(row.name, row.state, row.detail) for row in find_unfinished_runs(folder)]
        has_other_states = any(run.state != UNREADABLE_STATE for run in unfinished)
        records, title = load_records(folder, price_per_hour, allow_empty=has_other_states), folder.resolve().name
        written = write_report(records, folder, title, page_path=html, unfinished_runs=unfinished)
        print_report(written, title)
        if open_page:
            open_in_browser(written.page_path)


def compare(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", help="Folder with the results before a change.")],
    after: Annotated[Path, typer.Argument(metavar="AFTER", help="Folder with the results after the change.")],
    threshold: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="[METRIC=]PERCENT",
            help="Largest relative regression allowed. PERCENT, e.g. 10%, applies to all metrics; METRIC=PERCENT, e.g. "
            "held_out_loss=2%, applies to one metric. Default: 5%.",
        ),
    ] = None,
    as_json: JsonOption = False,
    html: Annotated[Optional[Path], typer.Option(help="Path of a page with the comparison. Default: no page.")] = None,
) -> None:
    """Compare two result folders run by run. Exit with code 61 if a metric got worse by more than --threshold."""
    from peftbench.cli.report_actions import compare_folders
    from peftbench.errors import REGRESSION_EXIT_CODE

    with cli_errors():
        if regression := compare_folders((before, after), threshold or [], as_json, html):
            print_to_stderr(regression)
            raise typer.Exit(REGRESSION_EXIT_CODE)
