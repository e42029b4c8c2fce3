"""The command ``cache``: what is cached on this machine, and its deletion."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from peftbench.common.console import cli_errors


def cache(
    clear: Annotated[
        Optional[list[str]],
        typer.Option(metavar="KIND", help="Delete this kind of content, or all. Repeatable."),
    ] = None,
) -> None:
    """Print what peftbench has cached on this machine, by kind, with its size.

    Everything can be computed again. The model and data caches of Hugging Face are not touched.
    """
    from peftbench.common.libraries import quiet_libraries
    from peftbench.common.units import format_bytes
    from peftbench.data.cache_usage import list_cache_usage
    from peftbench.errors import UnknownKeyError, did_you_mean

    with cli_errors():
        quiet_libraries()
        usage = {one.kind: one for one in list_cache_usage()}
        for kind in clear or []:
            if kind not in {*usage, "all"}:
                raise UnknownKeyError(f"there is no cache {kind!r}", did_you_mean(kind, [*usage, "all"]))
        for kind, one in usage.items():
            size = format_bytes(one.num_bytes)
            is_cleared = bool({kind, "all"} & set(clear or []))
            if is_cleared:
                one.clear()
            print(f"{kind:<11} {size:>10}  {'deleted: ' if is_cleared else ''}{one.content}")
            for folder in one.folders:
                print(f"{'':<23} {folder}")
