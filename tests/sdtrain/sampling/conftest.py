import pytest
import torch

from sdtrain.sampling.sampler import Sampler, load_networks
from tests.sdtrain.sampling.random_pipeline import write_random


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A pipeline with random weights whose prediction does depend on latents and caption."""
    return write_random(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="session")
def sampler(folder):
    return Sampler(load_networks(folder, "cpu", torch.float32))
