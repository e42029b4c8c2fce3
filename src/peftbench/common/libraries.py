"""Settings for large libraries: quiet logs, no telemetry, faster imports."""

from __future__ import annotations

import gc
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def imports_without_gc() -> Iterator[None]:
    """Disable garbage collection during imports, which create no garbage: a fifth less time to import torch."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def announce_hub_retries() -> None:
    """Print a line when the Hub does not answer and is asked again, for up to half a minute."""
    logger = logging.getLogger("huggingface_hub.utils._http")
    logger.setLevel(logging.WARNING)
    logger.addFilter(_announce_first_retry)


def _announce_first_retry(record: logging.LogRecord) -> bool:
    """Filter of a logger: replace the messages on retries by one line."""
    if found := re.search(r"\[Retry 1/(\d+)\]", record.getMessage()):
        sys.stderr.write(f"note: the Hub did not answer; trying again, up to {found[1]} times\n")
    return record.levelno >= logging.ERROR


def quiet_libraries() -> None:
    """Turn off telemetry, progress bars without a terminal, and log messages that a user cannot act on."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # datasets reads this at import, which takes half a second and is not needed by every command.
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")
    import huggingface_hub
    import transformers

    # Retries and files that do not parse end in one error message of peftbench.
    huggingface_hub.logging.set_verbosity_error()
    if sys.stderr.isatty():
        announce_hub_retries()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns about a faster kernel at each import
    # peft imports torchao if it is installed; torchao warns about kernels for other GPUs and about torch names.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # DeepSpeed sets its own level at import, and warns about a missing GPU on every machine without one.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # its bars are for shards that load in an instant
    warnings.filterwarnings("ignore", category=FutureWarning)
