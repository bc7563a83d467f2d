import numpy as np
import pytest
from PIL import Image

from sdtrain.images.miniature import MINIATURE_BYTES, SOURCE_PX, miniature, planes_of
from tests.image_fixtures import scene_image


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return scene_image(3, SOURCE_PX, SOURCE_PX)


def planes(image: Image.Image):
    return planes_of(np.frombuffer(miniature(image), np.uint8)[None])


def test_the_planes_are_means_and_extremes_of_their_cells(image):
    luma, cb, cr = (np.asarray(plane, float) for plane in image.convert("YCbCr").split())
    found = planes(image)
    assert len(miniature(image)) == MINIATURE_BYTES

    def cells(plane: np.ndarray, side: int) -> np.ndarray:
        return plane.reshape(side, SOURCE_PX // side, side, SOURCE_PX // side)

    assert np.abs(found.luma[0] - cells(luma, 32).mean((1, 3))).max() <= 0.5
    assert np.abs(found.chroma[0] - np.stack([cells(c, 8).mean((1, 3)) for c in (cb, cr)])).max() <= 0.5
    assert np.array_equal(found.dark[0], cells(luma, 16).min((1, 3)))
    assert np.array_equal(found.bright[0], cells(luma, 16).max((1, 3)))


def test_a_mirrored_image_has_the_mirrored_planes(image):
    mirrored = planes(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    for plane, other in zip(planes(image), mirrored, strict=True):
        assert np.array_equal(plane[..., ::-1], other)
