import numpy as np
import pytest
from PIL import Image

from sdtrain.evaluation.results import Axis, choose_axes, draw_curve

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


def test_axes_are_agreement_and_fid_unless_others_are_asked_for():
    scale, score = Axis("guidance_scale", "guidance scale"), Axis("clip_score", "CLIP score", "higher", "x")
    fid, fd = Axis("fid", "FID", "lower", "y"), Axis("fd_dinov2", "FD (DINOv2)", "lower", "y")
    known = {axis.column: axis for axis in (scale, fid, fd, score)}
    assert choose_axes(known, None, None) == (score, fid)
    assert choose_axes(known, "fid", "fd_dinov2") == (fid, fd)
    del known["clip_score"]
    assert choose_axes(known, None, None) == (None, fid)
    assert choose_axes(known, None, "fd_dinov2") == (scale, fd)
    assert (str(fd), str(scale)) == ("FD (DINOv2), lower is better", "guidance scale")
