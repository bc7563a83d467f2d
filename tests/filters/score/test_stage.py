import io
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from filters.recipe import Recipe, ScoreConfig
from filters.score.heads import load_aesthetic, load_aesthetic_v1, load_safety, load_watermark
from filters.score.preprocess import WATERMARK_MEAN, WATERMARK_STD, gray_of, measure
from filters.score.stage import SCORE
from sdtrain.dataset.manifest import require_entry
from sdtrain.dataset.stage import pending, run_batch
from sdtrain.dataset.tars import read_samples, write_samples
from sdtrain.errors import UserError
from sdtrain.images.decode import decode_rgb
from sdtrain.images.miniature import miniature
from sdtrain.models.clip import Preprocess, clip_view, load_clip, normalised, pixels_of
from tests.image_fixtures import Fetched, encoded, scene_image, write_downloads

RANDOM = ScoreConfig(
    clip_model="ViT-demo",
    clip_weights="random:0",
    aesthetic_weights="random:1",
    aesthetic_v1_weights="random:4",
    watermark_weights="random:2",
    safety_weights="random:3",
    batch_size=4,
)
NO_MODELS = ScoreConfig(clip_weights=None, aesthetic_weights=None, watermark_weights=None, safety_weights=None)
SCORES = ("aesthetic", "aesthetic_v1", "pwatermark", "punsafe", "similarity")
DAMAGED = encoded(scene_image(99))[:700]


def recipe_of(score: ScoreConfig) -> Recipe:
    return Recipe(name="test", score=score)


def squashed(image: Image.Image) -> Image.Image:
    return image.resize((256, 256), Image.Resampling.BILINEAR)


def make_rows() -> list[Fetched]:
    images = [Fetched(encoded(scene_image(i)), caption=f"caption {i}") for i in range(9)]
    return [*images, Fetched(None, reason="http_404"), Fetched(DAMAGED), Fetched(encoded(scene_image(11)), None)]


def score(dataset, config: ScoreConfig) -> list[dict]:
    recipe = recipe_of(config)
    run_batch(SCORE, dataset, recipe, pending(SCORE, dataset, recipe))
    return [row for shard in SCORE.shards(dataset, recipe) for row in pq.read_table(dataset.scores(shard)).to_pylist()]


def test_every_downloaded_image_gets_a_row_and_a_damaged_one_its_reason(tmp_path):
    dataset = write_downloads(tmp_path, make_rows())
    rows = score(dataset, RANDOM)
    assert len(rows) == 11
    assert [row["reason"] for row in rows] == [None] * 9 + ["undecodable", None]
    damaged = rows[9]
    assert all(damaged[name] is None for name in damaged if name not in ("uid", "key", "reason"))
    for row in rows[:9]:
        assert (row["image_width"], row["image_height"]) == (96, 80)
        assert 0 < row["pwatermark"] < 1
        assert 0 < row["punsafe"] < 1
        assert -1 <= row["similarity"] <= 1
        assert row["aesthetic"] is not None
    reports = [require_entry(dataset, "score", shard) for shard in (0, 1)]
    assert [(r.num_in, r.num_out, r.dropped) for r in reports] == [(9, 9, {}), (2, 1, {"undecodable": 1})]


def test_scores_are_what_the_networks_say_of_the_image_and_its_caption(tmp_path):
    dataset = write_downloads(tmp_path, [Fetched(encoded(scene_image(5)), caption="a blue ring")])
    (row,) = score(dataset, RANDOM)
    image = decode_rgb(encoded(scene_image(5)))
    clip, tokenizer = load_clip("ViT-demo", "random:0")
    with torch.inference_mode():
        preprocess = Preprocess(64)
        pixels = pixels_of(clip_view(image, preprocess))[None]
        embedding = clip.encode_image(normalised(pixels, preprocess.mean, preprocess.std))
        text = clip.encode_text(tokenizer(["a blue ring"]))
        assert row["similarity"] == pytest.approx(torch.cosine_similarity(embedding, text).item(), abs=1e-5)
        assert row["aesthetic"] == pytest.approx(load_aesthetic("random:1")(embedding).item(), abs=1e-4)
        assert row["aesthetic_v1"] == pytest.approx(load_aesthetic_v1("random:4")(embedding).item(), abs=1e-4)
        assert row["punsafe"] == pytest.approx(load_safety("random:3")(embedding).item(), abs=1e-5)
        pixels = normalised(pixels_of(squashed(image))[None], WATERMARK_MEAN, WATERMARK_STD)
        assert row["pwatermark"] == pytest.approx(load_watermark("random:2")(pixels).item(), abs=1e-5)


def test_the_measures_of_quality_are_those_of_the_decoded_image(tmp_path):
    dataset = write_downloads(tmp_path, [Fetched(encoded(scene_image(5)))])
    (row,) = score(dataset, NO_MODELS)
    wanted = measure(gray_of(squashed(decode_rgb(encoded(scene_image(5))))))
    assert {name: row[name] for name in wanted} == pytest.approx(wanted, abs=1e-6)


def assert_same(one: list[dict], other: list[dict]):
    """All columns equal, the networks' scores within 1e-5: sums are not always added in the same order."""
    for name in one[0]:
        found, wanted = [row[name] for row in one], [row[name] for row in other]
        assert found == (pytest.approx(wanted, abs=1e-5) if name in SCORES else wanted), name


def test_scores_do_not_depend_on_the_size_of_the_batch(tmp_path):
    one, seven = (
        score(write_downloads(tmp_path / str(size), make_rows()), RANDOM.model_copy(update={"batch_size": size}))
        for size in (1, 7)
    )
    assert_same(one, seven)


@pytest.mark.parametrize("kind", ["threads", pytest.param("processes", marks=pytest.mark.long)])
def test_scores_do_not_depend_on_how_many_workers_share_the_shards(tmp_path, kind):
    alone, shared = (write_downloads(tmp_path / name, make_rows()) for name in ("alone", "shared"))
    recipe = recipe_of(RANDOM)
    spawn = multiprocessing.get_context("spawn")
    with ThreadPoolExecutor(2) if kind == "threads" else ProcessPoolExecutor(2, spawn) as pool:
        list(pool.map(run_batch, [SCORE] * 2, [shared] * 2, [recipe] * 2, [[0], [1]]))
    assert pending(SCORE, shared, recipe) == []
    assert_same(score(shared, RANDOM), score(alone, RANDOM))


@pytest.mark.parametrize(("dtype", "apart"), [("bf16", 0.02), ("fp16", 0.005)])
def test_lower_precision_gives_nearly_the_same_scores_and_is_noted(tmp_path, dtype, apart):
    dataset = write_downloads(tmp_path, make_rows()[:4])
    wanted = score(dataset, RANDOM)
    lower = score(dataset, RANDOM.model_copy(update={"dtype": dtype}))
    assert pq.read_schema(dataset.scores(0)).metadata[b"sdtrain.dtype"] == dtype.encode()
    for name in ("pwatermark", "punsafe", "similarity"):
        assert [row[name] for row in lower] == pytest.approx([row[name] for row in wanted], abs=apart)
    assert [row["similarity"] for row in lower] != [row["similarity"] for row in wanted]


def test_embeddings_are_kept_where_they_are_wanted_in_half_precision(tmp_path):
    dataset = write_downloads(tmp_path, make_rows())
    assert "embedding" not in score(dataset, RANDOM)[0]
    rows = score(dataset, RANDOM.model_copy(update={"store_embeddings": True}))
    field = pq.read_schema(dataset.scores(0)).field("embedding")
    assert str(field.type) == "fixed_size_list<element: halffloat>[768]"
    assert [row["embedding"] is None for row in rows] == [row["reason"] is not None for row in rows]
    embeddings = np.array([row["embedding"] for row in rows if row["embedding"] is not None], np.float32)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-3)
    head = load_aesthetic("random:1")(torch.from_numpy(embeddings))
    assert head.tolist() == pytest.approx([row["aesthetic"] for row in rows if row["embedding"] is not None], abs=0.02)
    norm = f"SELECT max(abs(list_sum(list_transform(embedding, x -> x * x)) - 1)) FROM '{dataset.scores(0)}'"
    assert duckdb.sql(norm).fetchone()[0] < 1e-2, "and DuckDB reads them"


def test_miniatures_are_kept_where_they_are_wanted_and_change_no_other_dataset(tmp_path):
    dataset = write_downloads(tmp_path, make_rows())
    before, plain = SCORE.fingerprint(dataset, recipe_of(NO_MODELS), 0), NO_MODELS.described()
    assert "miniature" not in score(dataset, NO_MODELS)[0]
    assert not {name for name in plain if "miniature" in name}, "finished datasets record the digest of these"
    wanted = NO_MODELS.model_copy(update={"store_miniatures": True})
    assert SCORE.fingerprint(dataset, recipe_of(wanted), 0) != before
    rows = score(dataset, wanted)
    assert pq.read_schema(dataset.scores(0)).metadata[b"sdtrain.miniature"] == b"1"
    assert [row["miniature"] is None for row in rows] == [row["reason"] is not None for row in rows]
    assert rows[0]["miniature"] == miniature(squashed(decode_rgb(encoded(scene_image(0)))))


def rewrite(dataset, change):
    """The first shard's tar with other samples; `change` gets a list of (key, members)."""
    samples = [(key, dict(members)) for key, members in read_samples(dataset.images_tar(0))]
    change(samples)
    write_samples(dataset.images_tar(0), samples)


def test_a_sample_without_an_image_or_with_other_bytes_is_undecodable(tmp_path):
    dataset = write_downloads(tmp_path, make_rows())

    def change(samples):
        del samples[1][1]["jpg"]
        samples[2][1]["jpg"] = b"<html>no image</html>"
        samples[3][1]["jpg"] = b""

    rewrite(dataset, change)
    rows = score(dataset, RANDOM)
    assert [row["reason"] for row in rows[:5]] == [None, "undecodable", "undecodable", "undecodable", None]
    assert require_entry(dataset, "score", 0).dropped == {"undecodable": 3}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda samples: samples.pop(4), r"00000.tar lacks 1 samples that .*, 000000004 for one"),
        (lambda samples: samples.append(("000000077", {"jpg": b""})), r"00000.tar holds a sample 000000077"),
    ],
)
def test_a_tar_with_other_samples_than_its_table_lists_is_named(tmp_path, change, said):
    dataset = write_downloads(tmp_path, make_rows())
    rewrite(dataset, change)
    with pytest.raises(UserError, match=said):
        score(dataset, NO_MODELS)


def test_a_tar_that_was_cut_short_is_named_and_the_shards_before_it_are_kept(tmp_path):
    dataset = write_downloads(tmp_path, make_rows())
    content = dataset.images_tar(1).read_bytes()
    dataset.images_tar(1).write_bytes(content[: len(content) // 3])
    with pytest.raises(UserError, match=r"images/00001.tar is damaged or cut short .* Delete it"):
        score(dataset, NO_MODELS)
    assert pending(SCORE, dataset, recipe_of(NO_MODELS)) == [1]


def test_a_shard_without_images_gives_an_empty_table(tmp_path):
    dataset = write_downloads(tmp_path, [Fetched(None, reason="timeout")])
    assert score(dataset, RANDOM) == []
    assert require_entry(dataset, "score", 0).num_in == 0


def test_skipped_models_leave_null_and_hashes_are_there_all_the_same(tmp_path):
    dataset = write_downloads(tmp_path, make_rows())
    rows = score(dataset, NO_MODELS)
    assert all(row[name] is None for row in rows for name in SCORES)
    assert all(row["pixel_sha256"] and row["phash"] is not None for row in rows if row["reason"] is None)


def test_without_clip_the_heads_that_need_its_embedding_are_not_asked_for(tmp_path):
    dataset = write_downloads(tmp_path, make_rows()[:2])
    config = ScoreConfig(clip_weights=None, watermark_weights="random:0", aesthetic_weights="/nowhere/head.pth")
    assert all(row["aesthetic"] is None and row["pwatermark"] is not None for row in score(dataset, config))


def test_a_second_run_does_nothing_and_a_rerun_gives_the_same_bytes(tmp_path, digests):
    dataset = write_downloads(tmp_path, make_rows())
    score(dataset, RANDOM)
    assert pending(SCORE, dataset, recipe_of(RANDOM)) == []
    before = digests(dataset)
    run_batch(SCORE, dataset, recipe_of(RANDOM), [1, 0])
    assert digests(dataset) == before


def test_other_weights_make_the_scores_pending_again(tmp_path):
    dataset = write_downloads(tmp_path, make_rows())
    score(dataset, NO_MODELS)
    for other in ({"watermark_weights": "random:7"}, {"clip_weights": "random:7", "clip_model": "ViT-demo"}):
        assert pending(SCORE, dataset, recipe_of(NO_MODELS.model_copy(update=other))) == [0, 1]


def test_the_table_says_which_weights_gave_its_scores(tmp_path):
    dataset = write_downloads(tmp_path, make_rows()[:2])
    score(dataset, RANDOM)
    described = pq.read_schema(dataset.scores(0)).metadata
    assert described[b"sdtrain.clip_model"] == b"ViT-demo"
    assert described[b"sdtrain.watermark_digest"] == b"random:2"
    assert described[b"sdtrain.dtype"] == b"float32"
    assert (described[b"sdtrain.decode"], described[b"sdtrain.device"]) == (b"cpu", b"cpu")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "P", "I;16", "CMYK", "1"])
def test_images_of_every_mode_are_scored(tmp_path, mode):
    source = scene_image(6).convert("L").convert("I;16") if mode == "I;16" else scene_image(6).convert(mode)
    content = encoded(source, "tiff" if mode in ("I;16", "CMYK") else "png")
    assert Image.open(io.BytesIO(content)).mode == mode
    dataset = write_downloads(tmp_path, [Fetched(content)])
    (row,) = score(dataset, NO_MODELS)
    assert row["reason"] is None
