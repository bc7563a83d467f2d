import io
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import imagehash
import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from sdtrain.dataset.config import DownloadConfig
from sdtrain.images.decode import ImageError, decode_rgb
from sdtrain.images.store import ImageMaker
from tests.sdtrain.download.download_fixtures import encoded, photo
from tests.sdtrain.images.hostile_images import GOOD, HOSTILE, exif_turned, opened

MODES = ("no", "keep_ratio", "center_crop", "border", "keep_ratio_largest")
REFERENCES = Path(__file__).parents[4] / "shared" / "data" / "resize_reference"
PHOTOS = REFERENCES.parent / "photos"


def maker(**settings):
    return ImageMaker(DownloadConfig(**{"image_size": 48} | settings))


def bgr(content):
    return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)


@pytest.mark.parametrize("name", HOSTILE)
def test_every_hostile_body_ends_in_its_reason(name):
    body, reason = HOSTILE[name]
    with pytest.raises(ImageError) as refused:
        maker()(body)
    assert refused.value.reason == reason


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("reencode", ["always", "if_changed"])
def test_every_kind_of_image_is_stored_upright_in_rgb(name, reencode):
    stored = maker(reencode=reencode, image_size=1000)(GOOD[name])
    expected = decode_rgb(GOOD[name])
    decoded = opened(stored.content)
    assert (decoded.format, decoded.mode, decoded.getexif().get(274, 1)) == ("JPEG", "RGB", 1)
    assert decoded.size == expected.size == (stored.width, stored.height)
    assert (stored.original_width, stored.original_height) == expected.size
    assert np.abs(np.asarray(decoded, int) - np.asarray(expected, int)).mean() < 16
    assert stored.extension == "jpg"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(96, 64), (40, 60), (64, 48), (33, 200)])
def test_plain_images_get_the_bytes_of_the_stock_resizer(mode, size, monkeypatch):
    from sdtrain.images import resize

    body = encoded(photo(7, *size))
    ours = maker(resize_mode=mode, reencode="always")(body)
    stock = resize._module()
    monkeypatch.setattr(stock, "cv2", cv2)
    content, width, height, *original, error = stock.Resizer(48, mode, True)(io.BytesIO(body))
    assert error is None
    assert ours.content == content
    assert (ours.width, ours.height, ours.original_width, ours.original_height) == (width, height, *original)


@pytest.mark.skipif(not REFERENCES.exists(), reason="no reference images beside the checkout")
@pytest.mark.parametrize("mode", MODES)
def test_pixels_are_those_of_the_reference_images(mode):
    stored = maker(resize_mode=mode, image_size=600, resize_only_if_bigger=False, reencode="always")(
        (REFERENCES / "original.png").read_bytes()
    )
    expected = bgr((REFERENCES / f"resize_{mode}.jpg").read_bytes())
    assert bgr(stored.content).shape == expected.shape
    assert np.abs(bgr(stored.content).astype(int) - expected).mean() < 2.5  # made with other versions


def test_if_changed_keeps_the_bytes_where_nothing_changes():
    body = GOOD["jpeg"]
    assert maker(image_size=300, reencode="if_changed")(body).content is body
    assert maker(image_size=300, reencode="always")(body).content != body
    assert maker(image_size=100, reencode="if_changed")(body).content != body
    assert maker(image_size=300, reencode="if_changed", encode_format="webp")(body).content != body
    assert maker(image_size=300, reencode="if_changed", resize_only_if_bigger=False)(body).content != body


@pytest.mark.parametrize("name", ["gray_jpeg", "cmyk_jpeg", "turned_6"])
def test_if_changed_encodes_what_had_to_be_converted(name):
    assert maker(image_size=1000, reencode="if_changed")(GOOD[name]).content != GOOD[name]


@pytest.mark.parametrize(
    "name", ["jpeg", "png", "webp", "cmyk_jpeg", "clear_png", "turned_6", "webp_animation", "avif"]
)
def test_never_keeps_all_bytes_under_their_true_extension(name):
    stored = maker(reencode="never", resize_mode="no")(GOOD[name])
    assert stored.content is GOOD[name]
    assert stored.extension == opened(GOOD[name]).format.lower().replace("jpeg", "jpg")
    assert (stored.width, stored.height) == decode_rgb(GOOD[name]).size


@pytest.mark.parametrize("name", ["gif", "bmp", "tiff"])
def test_never_refuses_what_cannot_be_stored_as_it_is(name):
    with pytest.raises(ImageError) as refused:
        maker(reencode="never", resize_mode="no")(GOOD[name])
    assert refused.value.reason == "other_format"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"reencode": "never"}, 'resize_mode: "no"'),
        ({"resize_mode": "no", "scaled_decoding": True}, "scaled_decoding is for images that are scaled down"),
        ({"encode_format": "png"}, "compression level from 0 to 9, not 95"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, words):
    with pytest.raises(ValidationError, match=words):
        DownloadConfig(**settings)


def test_sizes_are_those_of_the_upright_image():
    stored = maker(image_size=40)(exif_turned(6))
    assert (stored.original_width, stored.original_height, stored.width, stored.height) == (80, 120, 40, 60)


@pytest.mark.parametrize("form", ["jpg", "png", "webp"])
def test_every_encode_format_is_written(form):
    quality = {"encode_quality": 6} if form == "png" else {}
    stored = maker(encode_format=form, **quality)(GOOD["jpeg"])
    assert (stored.extension, opened(stored.content).format.lower()) == (form, form.replace("jpg", "jpeg"))


def test_threads_side_by_side_get_what_one_alone_gets():
    make, bodies = maker(), [*GOOD.values()] * 4
    alone = [make(body) for body in bodies]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(make, bodies)) == alone


def test_big_images_are_made_one_at_a_time(monkeypatch):
    monkeypatch.setattr("sdtrain.images.store._BIG_PIXELS", 100)
    make, inside, most = maker(), [], []

    def watched(self, content, header):
        inside.append(1)
        most.append(len(inside))
        threading.Event().wait(0.01)
        inside.pop()

    monkeypatch.setattr(ImageMaker, "_make", watched)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(make, [GOOD["jpeg"]] * 12))
    assert max(most) == 1


def test_an_unforeseen_error_is_one_lost_image_and_is_logged(monkeypatch, caplog):
    monkeypatch.setattr("sdtrain.images.store.read_header", lambda *_: 1 / 0)
    with pytest.raises(ImageError, match="not_an_image: unexpected ZeroDivisionError"):
        maker()(GOOD["jpeg"])
    assert "Unexpected failure of an image" in caplog.text


def test_the_perceptual_hash_is_close_to_imagehash_of_the_stored_image():
    distances = []
    for seed in range(40):
        stored = maker(image_size=300)(encoded(photo(seed, 500, 400)))
        expected = int(str(imagehash.phash(opened(stored.content))), 16)
        distances.append(((stored.phash % 2**64) ^ expected).bit_count())
    assert max(distances) <= 6
    assert np.mean(distances) < 1.5


def psnr_db(content, other):
    return cv2.PSNR(bgr(content), bgr(other))


def size_of(stored):
    return stored.width, stored.height, stored.original_width, stored.original_height


@pytest.mark.skipif(not PHOTOS.exists(), reason="no photographs beside the checkout")
@pytest.mark.parametrize(("image_size", "least_db"), [(256, 41), (200, 31), (128, 41)])
def test_scaled_decoding_of_photographs_is_close_to_the_exact_pixels(image_size, least_db):
    exact, scaled = (maker(image_size=image_size, scaled_decoding=on) for on in (False, True))
    for path in sorted(PHOTOS.glob("kodak_*.png")):
        body = encoded(Image.open(path).convert("RGB"))
        expected, found = exact(body), scaled(body)
        assert found.content != expected.content
        assert size_of(found) == size_of(expected)
        assert psnr_db(found.content, expected.content) > least_db
        assert ((found.phash ^ expected.phash) & (2**64 - 1)).bit_count() <= 4


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("size", [(192, 128), (96, 96), (98, 130), (384, 512), (96, 800), (104, 96)])
def test_scaled_decoding_gives_images_of_the_same_size(mode, size):
    body = encoded(photo(5, *size))
    expected, found = (maker(resize_mode=mode, scaled_decoding=on)(body) for on in (False, True))
    assert size_of(found) == size_of(expected)
    assert psnr_db(found.content, expected.content) > 30


OTHERS = {
    "smaller than twice": encoded(photo(5, 94, 94)),
    "odd": encoded(photo(5, 193, 128)),
    "png": encoded(photo(5, 192, 128), "png"),
    "gray": encoded(photo(5, 192, 128, "L")),
    "turned": exif_turned(6),
}


@pytest.mark.parametrize("name", OTHERS)
def test_scaled_decoding_leaves_other_images_as_they_are(name):
    assert maker(scaled_decoding=True)(OTHERS[name]).content == maker()(OTHERS[name]).content


def test_a_damaged_jpeg_is_none_with_scaled_decoding_either():
    body = bytearray(encoded(photo(5, 192, 128)))
    body[200:400] = bytes(200)
    outcomes = []
    for on in (False, True):
        try:
            outcomes.append(size_of(maker(scaled_decoding=on)(bytes(body))))
        except ImageError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]
