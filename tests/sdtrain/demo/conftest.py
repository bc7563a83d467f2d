import pytest

from sdtrain.demo.rows import Row, plan_rows
from sdtrain.demo.world import World, make_world

NUM_ROWS, SEED = 70, 7


@pytest.fixture(scope="session")
def rows() -> list[Row]:
    return plan_rows(NUM_ROWS, SEED)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), NUM_ROWS, SEED, http_port=0, https_port=0, num_processes=1)
