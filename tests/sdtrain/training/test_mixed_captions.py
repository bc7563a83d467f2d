"""Training on several captions of a sample: a resumed run is the same, and one without the setting as before."""

import pytest

from sdtrain.config import load_config
from sdtrain.errors import UserError
from sdtrain.train import train
from sdtrain.training.run_dir import RunDir
from tests.sdtrain.encode.caption_fixtures import add_captions
from tests.sdtrain.encode.packed_fixtures import Recipe, encode, write_packed
from tests.training_fixtures import write_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    found = add_captions(write_packed(folder / "captioned")), write_packed(folder / "plain")
    for dataset in found:
        encode(dataset, Recipe("demo"))
    return found


def trained(folder, dataset, ranks, captions=None, steps=4, name="run"):
    """The run's losses."""
    data = {"root": str(dataset.root), "resolution": 64} | ({"captions": captions} if captions else {})
    changes = {"vae": "demo", "text_encoder": "demo", "caption_dropout": 0.4, "steps": steps, "data": data}
    config = load_config(str(write_config(folder / "run.yaml", dataset.root, dataset.root, **changes)))
    run = RunDir(folder / name)
    run.check_config(config)
    train(config, run, ranks)
    return [row["loss"] for row in run.log.rows()]


def test_without_the_setting_a_dataset_with_captions_trains_as_one_without_bit_for_bit(tmp_path, datasets, ranks):
    losses = [trained(tmp_path, dataset, ranks, name=str(n)) for n, dataset in enumerate(datasets)]
    assert losses[0] == losses[1]
    assert trained(tmp_path, datasets[0], ranks, {"long": 0.9, "alt": 0.1}, name="mixed") != losses[0]


def test_a_stopped_run_goes_on_with_the_same_captions_and_may_not_change_their_shares(tmp_path, datasets, ranks):
    shares = {"alt": 0.3, "short": 0.6, "long": 0.1}
    whole = trained(tmp_path, datasets[0], ranks, shares, name="whole")
    trained(tmp_path, datasets[0], ranks, shares, steps=2, name="stopped")
    assert trained(tmp_path, datasets[0], ranks, shares, name="stopped") == whole
    with pytest.raises(UserError, match=r"data\.captions decides which samples, captions and noise a step sees"):
        trained(tmp_path, datasets[0], ranks, shares | {"alt": 0.4}, steps=5, name="stopped")
