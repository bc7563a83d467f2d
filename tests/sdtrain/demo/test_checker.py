import numpy as np
import pytest
from PIL import Image, ImageFilter

from sdtrain.demo.checker import Verdict, agreement, classify, pair_in
from sdtrain.demo.images import COLORS, SHAPES, draw, random_scene

PAIRS = [(color, shape) for color in COLORS for shape in SHAPES]


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(11)
    return [
        draw(random_scene(rng, *PAIRS[i % len(PAIRS)]), 256, 256).resize((64, 64), Image.Resampling.BICUBIC)
        for i in range(360)
    ]


@pytest.fixture(scope="module")
def wanted() -> list[tuple[str, str]]:
    return [PAIRS[i % len(PAIRS)] for i in range(360)]


@pytest.mark.parametrize("radius_px", [0, 1])
def test_judges_clean_and_blurred_images(
    images: list[Image.Image], wanted: list[tuple[str, str]], radius_px: float
) -> None:
    found = agreement([image.filter(ImageFilter.GaussianBlur(radius_px)) for image in images], wanted)
    assert found.num_images == 360
    assert found.color >= 0.99
    assert found.shape >= 0.97


def test_wrong_pairs_do_not_agree(images: list[Image.Image], wanted: list[tuple[str, str]]) -> None:
    next_shape = dict(zip(SHAPES, (*SHAPES[1:], SHAPES[0]), strict=True))
    found = agreement(images, [(color, next_shape[shape]) for color, shape in wanted])
    assert found.color >= 0.99
    assert found.shape == 0
    assert found.both == 0


def test_grey_noise_and_mere_backgrounds_are_not_guessed_at() -> None:
    rng = np.random.default_rng(0)
    nothing = Verdict(None, None)
    assert classify(Image.new("RGB", (64, 64), (128, 128, 128))) == nothing
    for size in (64, 8):
        for _ in range(30):
            noise = Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
            assert classify(noise.resize((64, 64))) == nothing


def test_a_colour_between_two_of_ours_is_none_but_its_shape_is_seen() -> None:
    image = Image.new("RGB", (64, 64), (128, 128, 128))
    image.paste((250, 110, 10), (16, 16, 48, 48))
    assert classify(image) == Verdict(None, "square")


def test_pair_in_reads_prompts() -> None:
    assert pair_in("A red star, dotted background") == ("red", "star")
    with pytest.raises(ValueError, match="one colour and one shape"):
        pair_in("a red thing")


def test_agreement_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        agreement([], [])
