from PIL import Image

from flows.demo_report import write_modified
from tests.sdtrain.sampling.random_pipeline import write_random


def test_a_sheet_shows_an_image_and_what_is_made_of_it(tmp_path):
    model, sheet = write_random(tmp_path), tmp_path / "sheet.png"
    write_modified(model, Image.new("RGB", (64, 64), "red"), "a red square", sheet)
    with Image.open(sheet) as image:
        colors = image.convert("RGB").getcolors(1 << 24)
    num_red = sum(num for num, color in colors if color == (255, 0, 0))
    assert num_red == 2 * 192**2  # once a row
    assert len(colors) > 1000
    assert sorted(path.name for path in tmp_path.glob(".*")) == []
