"""A planted copy of a training image is found among samples, and new images are not flagged."""

import io
import json
import sys

import pytest
from PIL import Image, ImageEnhance
from PIL.PngImagePlugin import PngInfo

from filters.memorization import similarity
from filters.memorization.check import check_samples, write_memorised
from filters.memorization.samples import read_samples, repeated_captions
from filters.memorization.similarity import Calibration, Limits, Neighbour
from filters.score.sscd import SscdEncoder
from filters.search.hits import Hit, image_of
from filters.search.search import Search
from sdtrain import cli
from sdtrain.dataset.tars import write_samples
from sdtrain.errors import UserError
from tests.filters.removal_fixtures import caption_of, copy_of, make_photo
from tests.filters.sscd_fixtures import Published, write_scripted

PLANTED, NEW = 12, (1001, 1002, 1003)
STRICT = Limits(threshold=0.9999)  # random weights put all photos near each other; the pixels decide


def photo(number):
    return Image.open(io.BytesIO(make_photo(number))).convert("RGB")


def write_drawn(folder):
    """New images, and one that repeats a training image, brighter and smaller; with prompts as `sample` writes."""
    folder.mkdir()
    for number in NEW:
        photo(number).save(folder / f"{number}.png")
    made = PngInfo()
    made.add_itxt("sdtrain", json.dumps({"prompt": "a planted one"}))
    repeated = ImageEnhance.Brightness(photo(PLANTED).resize((96, 72))).enhance(1.1)
    repeated.save(folder / "00000.png", pnginfo=made)
    photo(5).save(folder / "grid.png")  # a sheet, which is no sample
    return folder


@pytest.fixture
def drawn(tmp_path):
    return write_drawn(tmp_path / "drawn")


def test_the_planted_image_is_the_only_one_that_is_the_same(search, drawn):
    found = check_samples(search, read_samples(drawn), STRICT)
    assert [found.count(kind) for kind in ("same", "near-duplicate", "new")] == [1, 0, len(NEW)]
    first = found.verdicts[0]
    assert (first.sample.name, first.sample.prompt, first.kind) == ("00000.png", "a planted one", "same")
    assert first.neighbours[0].hit.caption == caption_of(PLANTED)
    assert first.neighbours[0].hash_bits <= 10
    assert first.neighbours[0].pixel_distance < 0.15
    assert {verdict.sample.name for verdict in found.verdicts[1:]} == {f"{number}.png" for number in NEW}


def test_samples_in_the_tars_of_an_evaluation_are_judged_alike(search, drawn, tmp_path):
    parts = tmp_path / "evaluation" / "samples" / "model" / "guidance-3"
    parts.mkdir(parents=True)
    images = sorted(p for p in drawn.glob("*.png") if p.stem != "grid")
    samples = [(f"{i:09d}", {"png": p.read_bytes(), "txt": b"a caption"}) for i, p in enumerate(images)]
    write_samples(parts / "00000.tar", samples[:2])
    write_samples(parts / "00001.tar", samples[2:])
    found = check_samples(search, read_samples(tmp_path / "evaluation"), STRICT)
    assert [found.count(kind) for kind in ("same", "new")] == [1, len(NEW)]
    assert found.verdicts[0].sample.name == "samples/model/guidance-3/00000.tar:000000000.png"
    assert found.verdicts[0].sample.prompt == "a caption"


def test_the_threshold_alone_calls_images_near_duplicates_and_the_notes_say_what_it_flags_by_itself(search, drawn):
    found = check_samples(search, read_samples(drawn), Limits(threshold=-1.0))
    assert (found.count("same"), found.count("near-duplicate")) == (1, len(NEW))
    assert found.calibration.summary()["nearest_other_flagged"] == 1
    assert "100.0% have another one at -1 or nearer" in found.notes[-1]


@pytest.fixture(scope="module")
def sscd_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("sscd") / "sscd_disc_mixup.torchscript.pt"
    write_scripted(path, Published())
    return path


@pytest.fixture(scope="module")
def sscd(sscd_file):
    return SscdEncoder(sscd_file, "cpu")


@pytest.fixture(scope="module")
def by_sscd(embedded_dataset, sscd, tmp_path_factory):
    """What is found where CLIP alone would flag everything, and SSCD flags what is nearest of all."""
    drawn = write_drawn(tmp_path_factory.mktemp("drawn") / "images")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(similarity, "_NUM_CALIBRATED_SSCD", 5)
        limits = Limits(threshold=-1.0, top=2, sscd_threshold=1.1)
        return check_samples(Search(embedded_dataset), read_samples(drawn), limits, sscd)


def test_sscd_decides_in_the_place_of_clip_where_its_weights_are_given(search, sscd, by_sscd):
    assert [by_sscd.count(kind) for kind in ("same", "near-duplicate", "new")] == [1, 0, len(NEW)]
    planted = by_sscd.verdicts[0]
    nearest = planted.neighbours[0]
    own, other = sscd.embed([planted.sample.read(), image_of(search.dataset, nearest.hit)])
    assert nearest.sscd == pytest.approx(float(own @ other), abs=1e-5)
    assert planted.similarity == max(neighbour.sscd for neighbour in planted.neighbours)
    for verdict in by_sscd.verdicts[1:]:
        cosines = [neighbour.sscd for neighbour in verdict.neighbours]
        assert cosines == sorted(cosines, reverse=True)
        assert not any(neighbour.is_near_duplicate(by_sscd.limits) for neighbour in verdict.neighbours)
        assert all(neighbour.is_near_duplicate(Limits(threshold=-1.0)) for neighbour in verdict.neighbours)
        assert all(n.is_near_duplicate(Limits(threshold=1.1, sscd_threshold=cosines[-1])) for n in verdict.neighbours)


def test_the_output_says_which_network_decided_and_that_clip_is_a_proxy(search, drawn, sscd, by_sscd):
    document = by_sscd.document()
    assert document["limits"] == {"network": "SSCD", "threshold": 1.1, "radius": 10, "pixels": 0.15}
    assert "sscd" in document["samples"][0]["neighbours"][0]
    assert sscd.digest[:12] in by_sscd.notes[0]
    assert not any("proxy" in note for note in by_sscd.notes)
    assert (document["calibration"]["num_images"], document["calibration"]["num_pairs"]) == (5, 10)
    by_clip = check_samples(search, read_samples(drawn), STRICT)
    assert by_clip.summary()["limits"]["network"] == "CLIP"
    assert "a proxy, since CLIP judges what is shown" in by_clip.notes[0]


def test_a_lost_image_is_no_near_duplicate_by_sscd():
    lost = Neighbour(Hit(0.99, "uid", "key", 0))
    assert lost.is_near_duplicate(Limits())
    assert not lost.is_near_duplicate(Limits(sscd_threshold=0.5))


def test_a_calibration_counts_what_reaches_the_limit():
    calibration = Calibration(0.9, [0.5, 0.9, 0.95, 0.2], [0.1, 0.2, 0.3, 0.91])
    summary = calibration.summary()
    assert (summary["nearest_other_flagged"], summary["pairs_by_chance_flagged"]) == (0.5, 0.25)
    assert summary["nearest_other"]["100%"] == 0.95
    assert Calibration(0.9, [], []).summary()["nearest_other_flagged"] is None


def test_the_references_are_kept_images_and_their_nearest_others(search):
    calibration = check_samples(search, read_none(), STRICT).calibration
    kept = search.some_vectors(1000)
    cosines = kept @ kept.T
    for place in range(len(kept)):
        cosines[place, place] = -1
    assert sorted(calibration.nearest) == pytest.approx(sorted(cosines.max(axis=1).tolist()), abs=2e-3)
    assert len(calibration.pairs) == len(kept) * (len(kept) - 1) // 2


def read_none():
    from filters.memorization.samples import Sample

    return [Sample("one", lambda: photo(1))]


def test_a_lost_training_image_is_no_crash(embedded_dataset, drawn, tmp_path):
    dataset = copy_of(embedded_dataset, tmp_path)
    for tar in dataset.root.glob("images/*.tar"):
        tar.unlink()
    found = check_samples(Search(dataset), read_samples(drawn), STRICT)
    assert found.count("same") == 0
    assert {neighbour.hash_bits for verdict in found.verdicts for neighbour in verdict.neighbours} == {None}
    assert all(path.stat().st_size for path in write_memorised(found, dataset, tmp_path / "out"))


def test_the_command_writes_sheets_and_figures(embedded_dataset, drawn, tmp_path, capsys, monkeypatch):
    out = tmp_path / "found"
    command = ["memorised", drawn, "--data", embedded_dataset.root, "--threshold", 0.9999, "--output", out]
    monkeypatch.setattr(sys, "argv", ["sdtrain", *map(str, command)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    said = capsys.readouterr().out
    assert "4 samples: 1 same, 0 near-duplicate, 3 new" in said
    figures = json.loads((out / "memorised.json").read_text())
    assert (figures["num_samples"], figures["same"], figures["limits"]["threshold"]) == (4, 1, 0.9999)
    assert figures["samples"][0]["neighbours"][0]["caption"] == caption_of(PLANTED)
    assert figures["calibration"]["num_images"] > 30
    with Image.open(out / "memorised.png") as sheet:
        assert sheet.height > 4 * 192
    assert "same: a planted one" in (out / "memorised.html").read_text()


def test_the_command_takes_the_weights_of_sscd(embedded_dataset, drawn, sscd_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(similarity, "_NUM_CALIBRATED_SSCD", 3)
    command = [
        "memorised",
        drawn,
        "--data",
        embedded_dataset.root,
        "--top",
        1,
        "--output",
        tmp_path / "found",
        "--json",
    ]
    command += ["--sscd", sscd_file, "--sscd-threshold", 0.25]
    monkeypatch.setattr(sys, "argv", ["sdtrain", *map(str, command)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    document = json.loads(capsys.readouterr().out)
    assert (document["limits"]["network"], document["limits"]["threshold"]) == ("SSCD", 0.25)
    assert all("sscd" in neighbour for sample in document["samples"] for neighbour in sample["neighbours"])


def test_captions_that_repeat_come_first(embedded_dataset):
    captions = repeated_captions(embedded_dataset, 3)
    assert len(captions) == 3
    assert all(num == 1 for _, num in captions)


def test_a_folder_without_samples_is_a_sentence(search, tmp_path):
    with pytest.raises(UserError, match="holds no images"):
        check_samples(search, read_samples(tmp_path))
    (tmp_path / "x.png").write_text("nothing")
    with pytest.raises(UserError, match=r"x\.png cannot be read as an image"):
        check_samples(search, read_samples(tmp_path))
