"""Ours beside stock img2dataset's own command, on the same server with the same settings."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sdtrain.dataset.tars import read_samples
from tests.sdtrain.download.download_fixtures import encoded, photo, prepare, serve_site
from tests.sdtrain.images.hostile_images import GOOD, PAGE

MODES = ("no", "keep_ratio", "center_crop", "border", "keep_ratio_largest")
SIZES = ((96, 64), (64, 96), (48, 48), (40, 30), (301, 200), (49, 900))
IMAGE_SIZE = 48
# The others take half a minute each: `make test-long`.
IN_CI = "center_crop"


@pytest.fixture(scope="module")
def site():
    with serve_site() as site:
        site.bodies |= {f"{w}x{h}.{form}": encoded(photo(w, w, h), form) for w, h in SIZES for form in ("jpeg", "png")}
        site.bodies |= {"webp": GOOD["webp"], "exif": with_exif(), "progressive": GOOD["progressive"], "page": PAGE}
        site.bodies |= {"junk": GOOD["junk_behind_jpeg"], "bmp": GOOD["bmp"], "tiff": GOOD["tiff"]}
        yield site


def with_exif():
    exif = Image.Exif()
    exif[271], exif[272], exif[306] = "Maker", "Modél", "2024:01:02 03:04:05"
    return encoded(photo(9, 120, 80), exif=exif)


def run_stock(folder, urls, mode):
    captions = [f"a cäption {number}" for number in range(len(urls))]
    folder.mkdir()
    pq.write_table(
        pa.table({"url": urls, "caption": captions, "uid": [f"uid-{n}" for n in range(len(urls))]}),
        folder / "in.parquet",
    )
    options = {
        "url_list": folder / "in.parquet", "input_format": "parquet", "url_col": "url", "caption_col": "caption",
        "save_additional_columns": '["uid"]', "output_folder": folder / "out", "output_format": "webdataset",
        "processes_count": 1, "thread_count": 8, "image_size": IMAGE_SIZE, "resize_mode": mode, "timeout": 5,
        "resize_only_if_bigger": True, "encode_quality": 95, "number_sample_per_shard": 1000, "enable_wandb": False,
    }  # fmt: skip
    command = [str(Path(sys.executable).with_name("img2dataset")), *(f"--{n}={value}" for n, value in options.items())]
    ended = subprocess.run(
        command, env=os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert ended.returncode == 0, ended.stdout.decode()
    return folder / "out"


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)))


@pytest.mark.slow
@pytest.mark.parametrize("mode", [m if m == IN_CI else pytest.param(m, marks=pytest.mark.long) for m in MODES])
def test_successes_pixels_columns_keys_and_metadata_are_stock_img2datasets(site, tmp_path, mode):
    urls = [site.url(name) for name in [*site.bodies, "missing"]]
    stock = run_stock(tmp_path / "stock", urls, mode)
    build = prepare(tmp_path / "ours", urls, per_shard=1000, image_size=IMAGE_SIZE, resize_mode=mode, reencode="always")
    build.run()

    theirs = {row["key"]: row for row in pq.read_table(stock / "00000.parquet").to_pylist()}
    ours = {row["key"]: row for row in build.rows()}
    columns = pq.read_schema(stock / "00000.parquet").names
    assert [name for name in pq.read_schema(build.dataset.images_table(0)).names if name in columns] == columns
    assert set(theirs) == set(ours)
    for key, row in theirs.items():
        assert {name: ours[key][name] for name in columns if name != "error_message"} == {
            name: value for name, value in row.items() if name != "error_message"
        }

    their_samples = dict(read_samples(stock / "00000.tar"))
    our_samples = dict(read_samples(build.dataset.images_tar(0)))
    assert set(their_samples) == set(our_samples)
    assert len(our_samples) == len(urls) - 2
    for key, parts in their_samples.items():
        assert set(parts) == set(our_samples[key])
        assert np.array_equal(pixels(our_samples[key]["jpg"]), pixels(parts["jpg"])), ours[key]["url"]
        assert our_samples[key]["txt"] == parts["txt"]
        described = json.loads(parts["json"])
        assert described.items() <= json.loads(our_samples[key]["json"]).items()

    stats = [json.loads(path.read_bytes()) for path in (stock / "00000_stats.json", build.dataset.images_stats(0))]
    assert [*stats[0], "selection_sha256"] == list(stats[1])
    for name in ("count", "successes", "failed_to_download", "failed_to_resize"):
        assert stats[0][name] == stats[1][name]
