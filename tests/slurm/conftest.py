"""One SLURM cluster for all tests of this folder. Without SLURM they are skipped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, cluster, find_missing_requirement


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """Start a cluster for the session; skip if this machine cannot run one."""
    if (reason := find_missing_requirement()) is not None:
        pytest.skip(reason)
    with cluster() as running_cluster:
        yield running_cluster
