"""One cluster for all tests of a folder, where there can be one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.launch import conftest as launching
from tests.slurm.cluster import Cluster, cluster, why_not

caches = launching.caches
"""Environment of launched processes, the same fixture."""


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """A SLURM that runs, or the reason why there is none."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with cluster() as found:
        yield found
