"""A SLURM for the tests on several hosts."""

from collections.abc import Iterator

import pytest

from tests.hosts.slurm_fixtures import slurm


@pytest.fixture(scope="module")
def slurm_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A SLURM that this process and its children use, for training on CPUs."""
    ours = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with slurm(tmp_path_factory.mktemp("slurm")) as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in (environment | ours).items():
            patch.setenv(name, value)
        yield
