import os

import pytest
import torch

from tests.training_fixtures import write_latents, write_models


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folders of tiny models and of latents."""
    folder = tmp_path_factory.mktemp("world")
    models = write_models(folder / "models")
    return models, write_latents(folder / "data", models)


@pytest.fixture(scope="module")
def ranks():
    """This process as the only rank."""
    from sdtrain.training.distributed import join

    before = dict(os.environ)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    joined = join(None)
    yield joined
    joined.close()
    os.environ.clear()
    os.environ.update(before)
