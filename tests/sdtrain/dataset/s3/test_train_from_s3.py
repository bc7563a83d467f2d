"""Training reads a dataset on S3 through a work folder: tables at once, a shard's latents when first needed."""

import shutil

import numpy as np
import pytest

from sdtrain.dataset.lock import lock_to_change
from sdtrain.dataset.manifest import describe_outputs, entries
from sdtrain.dataset.open import dataset_at, training_root
from sdtrain.dataset.shard_report import ShardReport
from sdtrain.dataset.stage import record
from sdtrain.encode.stage import ENCODE
from sdtrain.errors import UserError
from sdtrain.loading.image_store import ImageStore, OnlineVae
from sdtrain.loading.latent_store import LatentStore
from sdtrain.pack.stage import PACK
from tests.sdtrain.dataset.s3.s3_fixtures import BUCKET
from tests.sdtrain.encode.packed_fixtures import write_packed
from tests.sdtrain.exposure.run_fixtures import config_of, record_run
from tests.training_fixtures import write_latents, write_models

NUM_SHARDS, NUM_SAMPLES = 3, 50


@pytest.fixture
def written(store, tmp_path):
    """(URL, the same dataset on disk alone)."""
    local = write_latents(tmp_path / "local", write_models(tmp_path / "models"), NUM_SAMPLES)
    url = f"s3://{BUCKET}/{tmp_path.name}"
    dataset = dataset_at(url, tmp_path / "writer")
    with lock_to_change(dataset, "sdtrain build"):
        shutil.copytree(local / "latents", dataset.root / "latents")
        for shard in range(NUM_SHARDS):
            outputs = describe_outputs(dataset, [dataset.latents_tar(shard), dataset.latents_table(shard)])
            num = 20 if shard < 2 else 10
            record(ENCODE, dataset, ShardReport(stage="encode", shard=shard, num_in=num, num_out=num, outputs=outputs))
    return url, local


def test_latents_from_s3_are_those_of_the_disk_and_tars_come_when_needed(written):
    url, local = written
    root = training_root(url)
    there, here = LatentStore(root, 64, verify=True), LatentStore(local, 64)
    assert there.digest == here.digest
    assert not list(root.glob("latents/*.tar"))
    first = np.arange(5)
    assert there.get(first).equal(here.get(first))
    assert [path.name for path in root.glob("latents/*.tar")] == ["00000.tar"]
    everything = np.arange(NUM_SAMPLES)
    assert there.get(everything).equal(here.get(everything))


def test_uses_in_a_run_on_s3_are_those_of_a_run_on_the_disk(written, tmp_path, document):
    url, local = written
    answers = []
    for name, root in (("there", url), ("here", str(local))):
        config = config_of(tmp_path, tmp_path / "models", {"root": root}, steps=12)
        run = record_run(tmp_path / name, config, checkpoints=(1, 12))
        answers.append(document("exposed", run, "--uid", f"{7:032x}"))
    there, here = ([(use["step"], use["caption"]) for use in found["samples"][0]["uses"]] for found in answers)
    assert there == here != []
    assert [found["remarks"] for found in answers] == [[], []]


def test_packed_images_from_s3_are_those_of_the_disk_and_tars_come_when_needed(store, tmp_path):
    local = write_packed(tmp_path / "local")
    url = f"s3://{BUCKET}/{tmp_path.name}-images"
    dataset = dataset_at(url, tmp_path / "writer")
    with lock_to_change(dataset, "sdtrain build"):
        shutil.copytree(local.root / "dataset", dataset.root / "dataset")
        for entry in entries(local, "pack"):
            record(PACK, dataset, entry)
    root = training_root(url, online_vae=True)
    there, here = ImageStore(root, 32, OnlineVae("demo")), ImageStore(local.root, 32, OnlineVae("demo"))
    assert there.digest == here.digest
    assert not list(root.glob("dataset/*.tar"))
    for indices in (np.arange(2), np.arange(len(here))):
        seen, expected = there.buffer(len(indices), 0), here.buffer(len(indices), 0)
        there.fetch(indices, np.zeros_like(indices), 0, seen).require_whole()
        here.fetch(indices, np.zeros_like(indices), 0, expected).require_whole()
        np.testing.assert_array_equal(seen, expected)
        assert len(list(root.glob("dataset/*.tar"))) == (1 if len(indices) == 2 else 2)


def test_training_is_told_who_changes_the_dataset(written, tmp_path):
    url, _ = written
    with (
        lock_to_change(dataset_at(url, tmp_path / "writer"), "sdtrain remove"),
        pytest.raises(UserError, match=r"in use: sdtrain remove is running .* start the training again"),
    ):
        training_root(url)
