"""What a process that joins without a launcher passes on."""

import os

import pytest

from sdtrain.training.distributed import join

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def test_children_of_the_only_rank_do_not_take_its_port_for_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for _ in range(2):
        ranks = join(None)
        assert os.environ.keys() >= set(VARIABLES)
        ranks.close()
        assert not os.environ.keys() & set(VARIABLES)


def test_what_the_launcher_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    join(None).close()
    assert os.environ.keys() & set(VARIABLES) == {"RANK"}
