import threading

import pytest
import torch

from filters.recipe import ScoreConfig
from filters.score import models as module
from filters.score.models import Models, check_heads, load_models, score_batch
from filters.score.preprocess import PreprocessedImage
from sdtrain.errors import UserError
from sdtrain.models.clip import pixels_of
from tests.image_fixtures import scene_image

CPU = torch.device("cpu")


def preprocessed(number, reason=None):
    view = None if reason else pixels_of(scene_image(number, 256, 256))
    return PreprocessedImage({"key": number, "reason": reason}, "a caption", watermark=view)


def test_a_score_that_is_no_number_is_null_so_that_no_rule_takes_it_for_high():
    given = torch.tensor([float("nan"), 0.5, float("inf")])
    models = Models(CPU, watermark=lambda pixels: given)
    assert [row["pwatermark"] for row in score_batch([preprocessed(i) for i in range(3)], models).rows()] == [
        None,
        0.5,
        None,
    ]


def test_damaged_images_keep_their_place_and_the_networks_do_not_see_them():
    seen = []

    def watermark(pixels):
        seen.append(len(pixels))
        return torch.arange(len(pixels)).float()

    batch = [preprocessed(0, "undecodable"), preprocessed(1), preprocessed(2, "undecodable"), preprocessed(3)]
    rows = score_batch(batch, Models(CPU, watermark=watermark)).rows()
    assert [(row["key"], row.get("pwatermark")) for row in rows] == [(0, None), (1, 0.0), (2, None), (3, 1.0)]
    assert score_batch(batch[:1], Models(CPU, watermark=watermark)).rows() == [{"key": 0, "reason": "undecodable"}]
    assert seen == [2]


def test_threads_take_turns_at_the_networks():
    at_once, most = threading.Semaphore(0), []

    def watermark(pixels):
        at_once.release()
        most.append(at_once._value)
        threading.Event().wait(0.02)
        at_once.acquire()
        return torch.zeros(len(pixels))

    models = Models(CPU, watermark=watermark)
    threads = [threading.Thread(target=score_batch, args=([preprocessed(i)], models)) for i in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert max(most) == 1


SKIP = {"aesthetic_weights": None, "safety_weights": None, "watermark_weights": None}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"clip_model": "ViT-B-32", "clip_weights": "random:0"},
            "embeddings of 768 numbers, and those of ViT-B-32 have 512",
        ),
        ({"clip_model": "ViT-L-14", "clip_weights": "laion2b_s32b_b82k"}, "on those of ViT-L-14 its scores would mean"),
        ({"clip_model": "ViT-B-16-SigLIP", "clip_weights": "webli"}, "on those of ViT-B-16-SigLIP its scores"),
    ],
)
def test_heads_are_refused_on_embeddings_that_they_were_not_made_for(config, said):
    with pytest.raises(UserError, match=said):
        check_heads(ScoreConfig(**config))
    check_heads(ScoreConfig(**SKIP, **config))


def test_heads_fit_the_models_they_were_made_for():
    check_heads(ScoreConfig())
    check_heads(ScoreConfig(clip_model="ViT-demo", clip_weights="random:0"))


def test_decoding_by_a_gpu_is_refused_where_there_is_none():
    with pytest.raises(UserError, match=r"score\.decode: gpu needs an NVIDIA GPU, and none is seen here"):
        load_models(ScoreConfig(**SKIP, clip_weights=None, decode="gpu"))


@pytest.mark.parametrize(("num_gpus", "warns"), [(0, False), (1, False), (4, True)])
def test_one_process_beside_idle_gpus_says_how_to_use_them(monkeypatch, caplog, num_gpus, warns):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    module._load_models.cache_clear()
    load_models(ScoreConfig(**SKIP, clip_weights=None))
    assert ("4 GPUs are here and one process uses one" in caplog.text) is warns
