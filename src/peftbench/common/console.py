"""How the commands speak: one sentence for a user's mistake, quiet libraries, no telemetry."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

from peftbench.errors import EngineError, OutputError, PeftbenchError

INTERRUPT_EXIT_CODE = 130
"""Exit code after Ctrl-C, as shells have it."""


def get_launched_rank() -> int:
    """Return this process's rank by the launcher's environment: 0 for the main process, and without a launcher."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def cli_errors(on_error: Callable[[dict[str, object]], None] | None = None) -> Iterator[None]:
    """Turn a user's mistake into one sentence on standard error and its own exit code, without a traceback.

    ``report`` is told of the refusal, for whoever reads standard output.
    """
    try:
        yield
    except PeftbenchError as error:
        rank = get_launched_rank()
        if rank == 0 or isinstance(error, (EngineError, OutputError)):  # the others are the same on every rank
            prefix = "" if rank == 0 else f"[rank {rank}] "
            print(f"{prefix}error: {error}", file=sys.stderr, flush=True)
        if on_error is not None:
            on_error({"outcome": "refused", "error": str(error), "exit_code": error.exit_code})
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        print("interrupted: nothing was written; run the same command again", file=sys.stderr, flush=True)
        raise typer.Exit(INTERRUPT_EXIT_CODE) from None


def quiet_libraries() -> None:
    """No telemetry, no progress bars where nobody looks, and only what a user can act on in the log."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # It reads this when it is imported, which takes half a second and not every command needs.
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")
    import huggingface_hub
    import transformers

    # A retry, a file that does not parse: what these report on the way ends in one sentence of ours.
    huggingface_hub.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns of a faster kernel whenever it is imported
    # peft imports it where it is installed, and it warns of kernels for other GPUs and of names in torch.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Sets its own level when it is imported, and would say of every machine without a GPU that it has none.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # its bars are for shards that load in a blink
    warnings.filterwarnings("ignore", category=FutureWarning)
