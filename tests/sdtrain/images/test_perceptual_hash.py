import imagehash
import pytest
from PIL import Image

from sdtrain.images.decode import decode_rgb
from sdtrain.images.perceptual_hash import perceptual_hash
from tests.image_fixtures import encoded, scene_image

# Of pixels drawn by Pillow: changes only if the hash or the drawing does.
HASH_OF_SCENE_3 = -1831951039154706893


def test_the_perceptual_hash_is_a_known_number_and_close_for_copies():
    image = scene_image(3, 600, 520)
    assert perceptual_hash(image) == HASH_OF_SCENE_3
    copy = decode_rgb(encoded(image.resize((540, 468)), quality=75))
    assert (perceptual_hash(copy) ^ perceptual_hash(image)).bit_count() <= 4


def test_the_perceptual_hash_is_that_of_imagehash():
    for seed in range(20):
        image = scene_image(seed)
        assert f"{perceptual_hash(image) % 2**64:016x}" == str(imagehash.phash(image))


@pytest.mark.parametrize("value", [0, 128, 255])
@pytest.mark.parametrize("gap", [None, 3.0])
def test_the_hash_of_a_flat_image_is_of_its_brightness_alone(value, gap):
    assert perceptual_hash(Image.new("RGB", (70, 50), (value,) * 3), gap) % 2**64 == (2**63 if value else 0)
