import threading

import pytest
import torch

from filters.score import pipeline
from filters.score.models import Models
from filters.score.pipeline import num_threads, score_rows
from tests.image_fixtures import Fetched, encoded, scene_image, write_downloads


def watermark(pixels):
    """Stands for a network: the mean of each image, one by one, because sums of a batch round by its size."""
    return torch.stack([image.mean() for image in pixels])


MODELS = Models(torch.device("cpu"), watermark=watermark)


@pytest.fixture
def dataset(tmp_path):
    """Three shards of 10, 10 and 3 images, one of them damaged."""
    contents = [encoded(scene_image(i)) for i in range(23)]
    contents[12] = b"\xff\xd8 damaged"
    return write_downloads(tmp_path, [Fetched(content) for content in contents])


def test_rows_come_shard_by_shard_in_the_order_of_the_tar_whatever_the_batches(dataset):
    found = {size: list(score_rows(dataset, [2, 0, 1], MODELS, size, on_gpu=False)) for size in (1, 4, 10, 64)}
    assert [(shard, len(rows)) for shard, rows in found[4]] == [(2, 3), (0, 10), (1, 10)]
    assert all(rows == found[4] for rows in found.values())
    for shard, rows in found[4]:
        assert [row["key"] for row in rows] == [f"{100_000 * shard + i:09d}" for i in range(len(rows))]


def test_a_decoding_device_gives_nearly_the_same_rows(dataset):
    by_cpu = [row for _, rows in score_rows(dataset, [0, 1, 2], MODELS, 4, on_gpu=False) for row in rows]
    by_device = [row for _, rows in score_rows(dataset, [0, 1, 2], MODELS, 4, on_gpu=True) for row in rows]
    for ours, wanted in zip(by_device, by_cpu, strict=True):
        assert [ours[name] for name in ("key", "uid", "reason")] == [wanted[name] for name in ("key", "uid", "reason")]
        assert ours.get("pwatermark") == pytest.approx(wanted.get("pwatermark"), abs=0.01)


def test_the_next_images_are_decoded_while_the_networks_are_busy_and_not_without_end(dataset, monkeypatch):
    images, ahead = [], []
    original = pipeline.preprocess

    def preprocess(sample, required):
        images.append(sample.key)
        return original(sample, required)

    def slow(pixels):
        threading.Event().wait(0.15)
        ahead.append(len(images))
        return watermark(pixels)

    monkeypatch.setattr(pipeline, "preprocess", preprocess)
    models = Models(torch.device("cpu"), watermark=slow)
    list(score_rows(dataset, [0, 1, 2], models, 2, on_gpu=False))
    # One batch with the networks, two in the queue, one waiting to get there.
    assert [done - 2 * (turn + 1) for turn, done in enumerate(ahead[:5])] == [6] * 5


def test_who_stops_early_leaves_no_thread(dataset):
    rows = score_rows(dataset, [0, 1, 2], MODELS, 2, on_gpu=False)
    next(rows)
    rows.close()
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith(("in-background", "ThreadPoolExecutor"))]


@pytest.mark.parametrize(("cores", "gpus", "threads"), [(16, 1, 16), (64, 8, 8), (2, 0, 2), (4, 8, 2)])
def test_each_gpus_process_decodes_with_its_share_of_the_cores(monkeypatch, cores, gpus, threads):
    monkeypatch.setattr(pipeline.os, "sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert num_threads() == threads
