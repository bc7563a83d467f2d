"""Tests on several hosts use the helpers of the tests of one."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_fixtures import slurm

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS / "flows"), str(TESTS / "sdtrain")]


@pytest.fixture(scope="module")
def slurm_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A SLURM that this process and its children use, for training on CPUs."""
    ours = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with slurm(tmp_path_factory.mktemp("slurm")) as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in (environment | ours).items():
            patch.setenv(name, value)
        yield
