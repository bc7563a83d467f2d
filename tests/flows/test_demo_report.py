import shlex

import pytest
from PIL import Image, ImageChops
from typer.testing import CliRunner

from flows.demo_report import shown, summarise, write_modified
from sdtrain.cli import app
from sdtrain.demo.checker import Agreement
from tests.sdtrain.sampling.random_pipeline import write_random


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_random(tmp_path_factory.mktemp("model"))


def test_the_summary_has_six_images_that_its_command_draws_again(model, tmp_path):
    verdicts = {"seen": Agreement(color=0.967, shape=0.775, both=0.75, num_images=120)}
    summary = summarise(model, tmp_path / "six", verdicts, "python -m flows.demo")
    assert [(file.name, prompt, bool(note)) for file, prompt, note in summary.drawn.images] == [
        ("00000.png", "a red circle", False),
        ("00001.png", "a yellow square", False),
        ("00002.png", "a pink ring", False),
        ("00003.png", "a green circle", True),
        ("00004.png", "a blue square", True),
        ("00005.png", "a cyan cross", True),
    ]
    assert summary.facts[0].numbers == [("97 %", "colours right"), ("78 %", "shapes right")]
    again = [*shlex.split(summary.drawn.command)[1:], "--output", str(tmp_path / "again")]
    assert CliRunner().invoke(app, again).exit_code == 0
    for file, _, _ in summary.drawn.images:
        with Image.open(file) as first, Image.open(tmp_path / "again" / file.name) as second:
            assert max(high for _, high in ImageChops.difference(first, second).getextrema()) <= 1
    times = [file.stat().st_mtime_ns for file, _, _ in summary.drawn.images]
    summarise(model, tmp_path / "six", verdicts, "")
    assert [file.stat().st_mtime_ns for file, _, _ in summary.drawn.images] == times


def test_commands_name_paths_below_the_current_folder_from_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shown(tmp_path / "demo-output" / "data") == "demo-output/data"
    assert shown(tmp_path.parent) == str(tmp_path.parent)


def test_a_sheet_shows_an_image_and_what_is_made_of_it(model, tmp_path):
    sheet = tmp_path / "sheet.png"
    write_modified(model, Image.new("RGB", (64, 64), "red"), "a red square", sheet)
    with Image.open(sheet) as image:
        colors = image.convert("RGB").getcolors(1 << 24)
    num_red = sum(num for num, color in colors if color == (255, 0, 0))
    assert num_red == 2 * 192**2  # once a row
    assert len(colors) > 1000
    assert sorted(path.name for path in tmp_path.glob(".*")) == []
