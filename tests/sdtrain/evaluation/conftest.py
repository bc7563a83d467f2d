import pytest

from sdtrain.evaluation.protocol import Protocol
from tests.sdtrain.evaluation.evaluation_fixtures import PROMPTS, write_images
from tests.training_fixtures import write_run


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run with one checkpoint of a tiny UNet that nobody trained, 64 px."""
    return write_run(tmp_path_factory.mktemp("evaluated"), ema_offset=0.02)


@pytest.fixture
def little(tmp_path, monkeypatch):
    """Settings of an evaluation that takes seconds, with prompts and real images of its own."""
    monkeypatch.setenv("SDTRAIN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    return Protocol(
        prompts=str(tmp_path / "prompts.txt"),
        num_prompts=6,
        reference=str(write_images(tmp_path / "real", 12)),
        scales=(1.0, 3.0),
        num_steps=2,
        dtype="fp32",
        batch_size=2,
        part_size=4,
        networks=("demo",),
        agreement="demo",
    )
