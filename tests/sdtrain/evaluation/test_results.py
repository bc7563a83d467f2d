import numpy as np
import pytest
from PIL import Image

from sdtrain.evaluation.results import Axis, draw_curve

X, Y = Axis("clip_score", "CLIP score"), Axis("fid", "FID")


def rows(model, shift):
    points = [(scale, 0.2 + scale / 100, 20 + shift + (scale - 3) ** 2) for scale in (1.5, 3, 8)]
    names = ("guidance_scale", "clip_score", "fid")
    return [{"model": model, **dict(zip(names, point, strict=True)), "fid_ci95": 1} for point in points]


@pytest.fixture
def draw(tmp_path):
    def drawn(rows):
        draw_curve(rows, X, Y, "The protocol.", tmp_path / "curve.png")
        return (tmp_path / "curve.png").read_bytes()

    return drawn


def test_the_same_numbers_give_the_same_bytes_and_others_do_not(draw):
    assert draw(rows("a", 0)) == draw(rows("a", 0)) != draw(rows("a", 1))


def test_each_model_has_a_line_of_its_own_colour(draw, tmp_path):
    draw(rows("a", 0))
    one = {tuple(color) for _, color in Image.open(tmp_path / "curve.png").convert("RGB").getcolors(1 << 20)}
    draw([*rows("a", 0), *rows("b", 10)])
    image = Image.open(tmp_path / "curve.png").convert("RGB")
    two = {tuple(color) for _, color in image.getcolors(1 << 20)}
    assert (31, 122, 92) in one & two
    assert (209, 73, 91) in two - one
    assert np.asarray(image).std() > 10
