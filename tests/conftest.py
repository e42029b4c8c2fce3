"""Fixtures for all tests: a private cache, small base models with random weights, a small corpus, and recipes.

None of them needs the network or files outside the repository. Tests of larger data use the ``shared_data`` fixture,
which skips them if that data does not exist.
"""

from __future__ import annotations

import os
import tempfile

# Set before a Hugging Face library is imported, because each reads its environment once. The private cache keeps files
# of earlier test runs out; offline mode keeps the network out.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="peftbench-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"

import copy
import gc
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import pytest
import torch

from peftbench import shipped
from peftbench.data.sources import Files
from tests.helpers.corpus import examples, write_corpus, write_corpus_with_equal_summaries
from tests.helpers.models import FAMILIES, random_base
from tests.helpers.paths import REPOSITORY
from tests.helpers.training import reset_accelerators
from tests.helpers.workshop import Workshop

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give slow tests 20 minutes; the limit in pyproject.toml is for fast ones."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(1200))


def pytest_collection_finish() -> None:
    """Exclude the objects of all imported libraries, about a million, from each later garbage collection."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Delete the private cache."""
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def isolated_process_state() -> Iterator[None]:
    """Reset accelerate's process-wide state and the environment for each test."""
    with patch.dict(os.environ):  # engines write their rank to the environment
        reset_accelerators()
        yield
        reset_accelerators()


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the environment of launched processes: private caches, one thread, no GPU, and no Hub."""
    folder = tmp_path_factory.mktemp("caches")
    return os.environ | {
        "HF_HOME": str(folder / "huggingface"),
        "PEFTBENCH_CACHE": str(folder / "peftbench"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make accelerate use the CPU, even on a machine with a GPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture
def accelerator() -> Accelerator:
    """Return an accelerator for one process on CPU in float32."""
    from accelerate import Accelerator

    return Accelerator(cpu=True, mixed_precision="no")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of public data next to the repository, which is too large to commit."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("../shared/data does not exist")
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """Return the tokenizer of the shipped base model. Tests rely only on ids below its vocabulary size."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shipped.SHIPPED_MODEL_DIR)  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def fresh_base() -> Callable[[str], PreTrainedModel]:
    """Return a function from an architecture's name to a new copy of its base model, always with the same weights."""
    models: dict[str, PreTrainedModel] = {}

    def copy_base(architecture: str) -> PreTrainedModel:
        if architecture not in models:
            models[architecture] = random_base(FAMILIES[architecture]())
        return copy.deepcopy(models[architecture])

    return copy_base


@pytest.fixture(scope="session")
def base_folder(
    fresh_base: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    """Return a function from an architecture's name to a folder with its model and tokenizer, for ``model.path``."""
    folders: dict[str, Path] = {}

    def save_base(architecture: str) -> Path:
        if architecture not in folders:
            folder = folders[architecture] = tmp_path_factory.mktemp(architecture)
            fresh_base(architecture).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return folders[architecture]

    return save_base


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Return a source with a few dozen examples in three splits."""
    splits = {"train": examples(24, seed=1), "validation": examples(8, seed=2), "test": examples(8, seed=3)}
    return write_corpus(tmp_path_factory.mktemp("corpus"), splits)


@pytest.fixture
def workshop(base_folder: Callable[[str], Path], corpus: Files, tmp_path: Path, on_cpu: None) -> Workshop:
    """Return a factory of recipes over small base models, which run on CPU."""
    return Workshop(base_folder, corpus, tmp_path)


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    """Corpora whose rows all have the same number of labels, as in a simulated step.

    Short examples that are padded to data.max_length, and long ones that are cut to it without padding.
    """
    return {
        padding: write_corpus_with_equal_summaries(tmp_path_factory.mktemp(padding), times)
        for padding, times in (("max_length", 1), ("free", 12))
    }
