"""A planted copy of a training image is found among samples, and new images are not flagged."""

import io
import json
import sys

import pytest
from PIL import Image, ImageEnhance
from PIL.PngImagePlugin import PngInfo

from filters.memorization.check import check_samples, write_memorised
from filters.memorization.samples import read_samples, repeated_captions
from filters.memorization.similarity import Calibration, Limits
from filters.search.search import Search
from sdtrain import cli
from sdtrain.dataset.tars import write_samples
from sdtrain.errors import UserError
from tests.filters.removal_fixtures import caption_of, copy_of, make_photo

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
