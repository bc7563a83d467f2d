import pytest
import torch

from sdtrain.formats.export import ExportSettings, export_model
from tests.training_fixtures import write_run


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run at step 5, whose average is its raw weights plus 0.02."""
    return write_run(tmp_path_factory.mktemp("exchange"), ema_offset=0.02)


@pytest.fixture(scope="session")
def tokenizer(run):
    """The folder of the run's tokenizer, which no CompVis file holds."""
    return str(run.parent / "models")


@pytest.fixture(scope="session")
def full_file(run, tmp_path_factory):
    """The run in one file, raw weights and average."""
    return export_model(run, tmp_path_factory.mktemp("file") / "full.ckpt", ExportSettings("both"))


@pytest.fixture(scope="session")
def tensors(full_file):
    """Its tensors, read without sdtrain."""
    return torch.load(full_file, weights_only=True)["state_dict"]
