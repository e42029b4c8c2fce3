"""What all tests share: an own cache, small bases with random weights, a small corpus, and recipes over them.

Nothing here needs the network or a file outside the repository. Tests of larger shared data take the ``shared_data``
fixture, which skips them where that data is absent.
"""

from __future__ import annotations

import os
import tempfile

# Before any library of the hub is imported, since each reads its environment once: a cache of this run's own, so that
# no test passes by what an earlier run left behind, and no hub, so that none passes by the network.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="peftbench-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import pytest
import torch

from peftbench import shipped
from peftbench.data.sources import Files
from tests.helpers.corpus import examples, write_corpus
from tests.helpers.models import FAMILIES, random_base
from tests.helpers.paths import REPOSITORY
from tests.helpers.training import forget_accelerators
from tests.helpers.workshop import Workshop

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


torch.set_num_threads(1)


def pytest_unconfigure() -> None:
    """Leave no cache behind."""
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def one_process_is_one_run() -> Iterator[None]:
    """Accelerate keeps its state for the process, and a process is one run; here it is one test."""
    with patch.dict(os.environ):  # engines write their rank into it
        forget_accelerators()
        yield
        forget_accelerators()


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is bound in this test is bound to the CPU, on a machine with a GPU too."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture
def accelerator() -> Accelerator:
    """One process on CPU in float32."""
    from accelerate import Accelerator

    return Accelerator(cpu=True, mixed_precision="no")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Public data too large for the repository, kept beside it."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the shared data is not beside this checkout (../shared/data)")
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """The shipped base's tokenizer, of which tests use only that its ids are below its vocabulary's size."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shipped.SHIPPED_MODEL_DIR)  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def fresh_base() -> Callable[[str], PreTrainedModel]:
    """Given the name of an architecture, a new copy of its base, always with the same weights."""
    made: dict[str, PreTrainedModel] = {}

    def copied(architecture: str) -> PreTrainedModel:
        if architecture not in made:
            made[architecture] = random_base(FAMILIES[architecture]())
        return copy.deepcopy(made[architecture])

    return copied


@pytest.fixture(scope="session")
def base_folder(
    fresh_base: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    """Given the name of an architecture, a folder with its base and tokenizer, for a recipe's ``model.path``."""
    made: dict[str, Path] = {}

    def saved(architecture: str) -> Path:
        if architecture not in made:
            folder = made[architecture] = tmp_path_factory.mktemp(architecture)
            fresh_base(architecture).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return made[architecture]

    return saved


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A few dozen examples in three splits."""
    splits = {"train": examples(24, seed=1), "validation": examples(8, seed=2), "test": examples(8, seed=3)}
    return write_corpus(tmp_path_factory.mktemp("corpus"), splits)


@pytest.fixture
def workshop(base_folder: Callable[[str], Path], corpus: Files, tmp_path: Path, on_cpu: None) -> Workshop:
    """Recipes over small bases, run on CPU."""
    return Workshop(base_folder, corpus, tmp_path)
