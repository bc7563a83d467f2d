"""Prompts and reference images that were planted in the training data are found, and the numbers without them told."""

import csv
import io
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from filters.caption.table import Caption, write_captions
from filters.contamination import stage as contamination_stage
from filters.contamination import training_data
from filters.contamination.training_data import search_training_data
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.tars import index_samples
from sdtrain.endpoint.config import EndpointConfig
from sdtrain.errors import UserError
from sdtrain.evaluation.contamination import Occurrences
from sdtrain.evaluation.distances import FrechetDistance, gaussian_of
from sdtrain.evaluation.judging.following import with_prompt_following
from sdtrain.evaluation.layout import read_tensors
from sdtrain.evaluation.protocol import Protocol
from sdtrain.evaluation.results import read_results, table_of
from sdtrain.evaluation.sweep import plan
from sdtrain.evaluation.workers import run_sweep
from tests.chat_server import MODEL, chat_server, completion
from tests.filters.removal_fixtures import SMALL, caption_of, copy_of, make_photo
from tests.training_fixtures import write_run

KEPT, SAME, NEAR = 10, 11, 12
NEW = range(1001, 1007)
IN_TRAINING = ("CAPTION of 012: Ünïque.", "caption-of-025  ünïque")
PROMPTS = ("a new one", *IN_TRAINING, "another one", "caption-of-007 ünïque", "caption-of-01 ünïque", "...")
"""Among them those of a dropped image, half a caption, and one without a letter."""


def photo(content):
    return Image.open(io.BytesIO(content)).convert("RGB")


def stored_image(dataset, number):
    """The image of a caption as the dataset has stored it."""
    for tar in sorted(dataset.root.glob("images/*.tar")):
        for sample in index_samples(tar):
            content = tar.read_bytes()
            text, image = (sample.members[name] for name in ("txt", "jpg"))
            if content[text.offset : text.offset + text.size].decode() == caption_of(number):
                return photo(content[image.offset : image.offset + image.size])
    raise AssertionError(number)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A run with one checkpoint of a tiny UNet that nobody trained, 64 px."""
    return write_run(tmp_path_factory.mktemp("contaminated"), ema_offset=0.02)


@pytest.fixture(scope="module")
def planted(embedded_dataset, tmp_path_factory):
    """Real images: four of the training data, each changed more than the one before, a dropped one, and new ones."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "a-file.jpg").write_bytes(make_photo(KEPT))
    stored_image(embedded_dataset, SAME).save(folder / "b-pixels.png")
    photo(make_photo(NEAR)).resize((200, 150), Image.Resampling.BICUBIC).save(folder / "c-near.jpg", quality=70)
    (folder / "d-dropped.jpg").write_bytes(make_photo(SMALL[0]))
    for number in NEW:
        (folder / f"new-{number}.jpg").write_bytes(make_photo(number))
    return folder


@pytest.fixture(scope="module")
def protocol(planted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("settings")
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDTRAIN_CACHE", str(folder / "cache"))
        yield Protocol(
            prompts=str(folder / "prompts.txt"),
            num_prompts=len(PROMPTS),
            reference=str(planted),
            scales=(2.0,),
            num_steps=1,
            dtype="fp32",
            part_size=4,
            network="demo",
            agreement="none",
        )


def evaluated(protocol, model, folder, named=()):
    sweep = search_training_data(plan(protocol, [model], folder), named)
    return sweep, run_sweep(sweep, say=lambda line: None)


@pytest.fixture(scope="module")
def done(protocol, model, embedded_dataset, tmp_path_factory):
    """An evaluation that has been run, with the dataset named."""
    return evaluated(protocol, model, tmp_path_factory.mktemp("done"), [str(embedded_dataset.root)])


def test_what_was_planted_is_found_and_the_numbers_without_it_are_those_of_the_rest(done, embedded_dataset):
    sweep, results = done
    (found,) = results.contamination.values()
    assert found.prompts == Occurrences(num=7, found=2, by={"text": 2})
    by = {"bytes": 1, "pixels": 1, "perceptual": 3, "embedding": 0}
    assert found.reference == Occurrences(num=10, found=3, by=by)
    num_kept = sum(row["reason"] is None for row in pq.read_table(embedded_dataset.decisions).to_pylist())
    assert found.training_data == [f"{embedded_dataset.root}: {num_kept} samples"]
    (row,) = results.rows
    assert row["num_images_clean"] == 5

    with (sweep.directory.root / "contamination.csv").open(newline="") as file:
        listed = {(each["kind"], each["item"].rsplit("/")[-1], each["way"]) for each in csv.DictReader(file)}
    texts = {("prompt", text, "text") for text in IN_TRAINING}
    names = {
        "a-file.jpg": ("bytes", "perceptual"),
        "b-pixels.png": ("pixels", "perceptual"),
        "c-near.jpg": ("perceptual",),
    }
    assert listed == texts | {("reference", name, way) for name, ways in names.items() for way in ways}

    kept = [number for number, text in enumerate(sweep.prompts.texts) if text not in IN_TRAINING]
    parts = [sweep.directory.features(sweep.models[0].key, "guidance-2", part) for part in (0, 1)]
    ((folder, _),) = sweep.real
    drawn, real = (read_tensors(files)["features"].numpy() for files in (parts, [folder.reference(0)]))
    expected = FrechetDistance(gaussian_of(real[3:])).to(gaussian_of(drawn[kept]))
    assert row["fid_demo_features_clean"] == pytest.approx(expected)
    assert row["fid_demo_features_clean"] != pytest.approx(row["fid_demo_features"])
    assert np.isfinite(row["fid_demo_features_clean_ci95"])
    assert "kid_demo_features_clean_std" in row


def test_the_numbers_and_counts_stand_in_table_file_and_footnote(done, tmp_path):
    sweep, results = done
    assert " (clean " in table_of(results)[0]["fid_demo_features"]
    said = "of the prompts, 2 of 7 (text 2), of the reference images 3 of 10 (bytes 1, pixels 1, perceptual 3)"
    assert said in results.footnote()
    assert any(said in note for note in results.notes)
    assert read_results(sweep.directory.results) == results
    content = json.loads(sweep.directory.results.read_text())
    del content["contamination"]  # as earlier versions wrote it
    (tmp_path / "former.json").write_text(json.dumps(content))
    assert read_results(tmp_path / "former.json").contamination == {}


def test_a_run_says_on_what_it_was_trained_and_finished_parts_are_not_searched_again(
    protocol, model, done, embedded_dataset, tmp_path, monkeypatch
):
    shutil.copytree(done[0].directory.root, tmp_path / "out")
    own = tmp_path / "run"
    shutil.copytree(model, own)
    config = (own / "config.yaml").read_text()
    root = str(model.parent / "data")
    assert root in config
    (own / "config.yaml").write_text(config.replace(root, str(embedded_dataset.root)))
    _, results = evaluated(protocol, own, tmp_path / "out")
    (found,) = results.contamination.values()
    assert (found.prompts.found, found.reference.found) == (2, 3)

    def refuse(*given):
        raise AssertionError("searched again")

    monkeypatch.setattr(contamination_stage, "_in_images", refuse)
    before = (tmp_path / "out" / "results.json").read_bytes()
    evaluated(protocol, own, tmp_path / "out")
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    monkeypatch.setattr(contamination_stage, "RADIUS", 3)
    with pytest.raises(AssertionError, match="searched again"):
        evaluated(protocol, own, tmp_path / "out")


def test_equal_embeddings_are_found_where_the_dataset_has_those_of_a_trained_network(
    protocol, model, done, embedded_dataset, tmp_path, monkeypatch
):
    shutil.copytree(done[0].directory.root, tmp_path / "out")
    monkeypatch.setattr(training_data, "is_stand_in", lambda config: False)
    for module in (contamination_stage, training_data):
        monkeypatch.setattr(module, "THRESHOLD", 0.999995)  # random weights put all photos near each other
    _, results = evaluated(protocol, model, tmp_path / "out", [str(embedded_dataset.root)])
    (found,) = results.contamination.values()
    assert found.reference.by["embedding"] >= 1
    assert found.reference.found == 3
    assert "or a cosine of at least" in found.method


def test_with_statistics_only_the_prompts_are_looked_for(protocol, model, done, embedded_dataset, tmp_path):
    shutil.copytree(done[0].directory.root, tmp_path / "out")
    np.savez(tmp_path / "real.npz", mu=np.zeros(96), sigma=np.eye(96))
    protocol = protocol.model_copy(update={"reference": str(tmp_path / "real.npz")})
    _, results = evaluated(protocol, model, tmp_path / "out", [str(embedded_dataset.root)])
    (found,) = results.contamination.values()
    assert (found.prompts.found, found.reference) == (2, None)
    assert "nobody can tell which of its images" in " ".join(results.notes)
    assert results.rows[0]["fid_demo_features_clean"] is not None


def test_where_all_is_in_the_training_data_nothing_is_left_to_measure(protocol, model, embedded_dataset, tmp_path):
    (tmp_path / "prompts.txt").write_text("".join(f"{text}\n" for text in IN_TRAINING))
    protocol = protocol.model_copy(update={"num_prompts": 2, "prompts": str(tmp_path / "prompts.txt")})
    _, results = evaluated(protocol, model, tmp_path / "out", [str(embedded_dataset.root)])
    assert results.rows[0]["num_images_clean"] == 0
    assert results.rows[0]["fid_demo_features_clean"] is None
    assert "clean" not in table_of(results)[0]["fid_demo_features"]


def test_prompts_with_questions_are_looked_for_too(protocol, model, done, embedded_dataset, tmp_path):
    shutil.copytree(done[0].directory.root, tmp_path / "out")
    chances = {IN_TRAINING[0]: 0.9, "one of them": 0.5, "two of them": 0.3}
    asked = {"vqa_list": [["Is it there?", "Yes"]], "skills": ["object"]}
    lines = [json.dumps({"prompt": prompt} | asked) for prompt in chances]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))

    def reply(question):
        chance = next((chance for prompt, chance in chances.items() if f'"{prompt}"' in question.prompt), 0.5)
        return completion("Yes", logprobs={"Yes": math.log(chance), "No": math.log(1 - chance)})

    with chat_server(reply) as server:
        sweep = plan(protocol, [model], tmp_path / "out")
        judge = EndpointConfig(url=server.url, model=MODEL)
        sweep = with_prompt_following(sweep, tmp_path / "questions.jsonl", judge)
        sweep = search_training_data(sweep, [str(embedded_dataset.root)])
        results = run_sweep(sweep, say=lambda line: None)
    (found,) = results.contamination.values()
    assert found.further_prompts == Occurrences(num=3, found=1, by={"text": 1})
    (row,) = results.rows
    assert row["vqa_score"] == pytest.approx((0.9 + 0.5 + 0.3) / 3)
    assert row["vqa_score_clean"] == pytest.approx(0.4)
    assert row["vqa_score_clean_ci95"] == pytest.approx(1.96 * np.std([0.5, 0.3], ddof=1) / np.sqrt(2), rel=1e-4)
    assert "of the prompts with questions 1 of 3 (text 1)" in results.footnote()
    assert "prompt with questions" in (tmp_path / "out" / "contamination.csv").read_text()


def test_a_prompt_is_found_among_all_captions_of_a_sample(embedded_dataset, tmp_path):
    dataset = copy_of(embedded_dataset, tmp_path)
    (uid,) = pq.read_table(dataset.images_table(1), columns=["uid"]).slice(0, 1)["uid"].to_pylist()
    captions = [Caption(uid, "alt", "An OTHER name!", "a-duplicate"), Caption(uid, "long", "an other, name", uid)]
    write_captions(dataset.captions_table(1), captions)
    found = contamination_stage._in_images(dataset, [0, 1], ["nothing", "an other name", *IN_TRAINING], None)
    assert {(row["item"], row["uid"]) for row in found.to_pylist() if row["item"] == 1} == {(1, uid)}
    assert found.num_rows == 1 + len({row["item"] for row in found.to_pylist()} - {1})


def test_unknown_and_missing_training_data_is_told_and_a_named_one_must_be_there(protocol, model, tmp_path):
    sweep = plan(protocol, [model], tmp_path / "out")
    assert (
        search_training_data(sweep).training.notes()[0].startswith(f"Contamination by {model.parent}/data, on which ")
    )
    other = replace(sweep, models=(replace(sweep.models[0], path=tmp_path / "model.ckpt"),))
    assert "nothing records its training data" in search_training_data(other).training.notes()[0]
    with pytest.raises(UserError, match="recipe"):
        search_training_data(sweep, [str(DatasetDir(tmp_path / "none").root)])
