import hashlib
import shutil
import socket
from pathlib import Path

import mmh3
import pyarrow.parquet as pq
import pytest
from PIL import Image

from filters.recipe import load_recipe
from sdtrain.demo.rows import Row, plan_rows
from sdtrain.demo.world import SCHEMA, World, make_world, open_world
from sdtrain.errors import UserError


def _digests(world: World) -> dict[str, str]:
    folder = world.images
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_metadata_has_exactly_laions_columns_and_types(world: World) -> None:
    files = sorted(world.metadata.glob("*.parquet"))
    assert len(files) == 2
    assert all(pq.read_schema(file).equals(SCHEMA) for file in files)
    assert pq.read_table(world.metadata).num_rows == world.num_rows


def test_hash_is_that_of_url_and_text(world: World) -> None:
    for row in pq.read_table(world.metadata).to_pylist():
        assert row["hash"] == mmh3.hash64(row["URL"] + (row["TEXT"] or ""))[0]


def test_urls_are_half_http_half_https_and_include_what_must_not_be_fetched(world: World) -> None:
    schemes = [row["URL"].split(":")[0] for row in pq.read_table(world.metadata).to_pylist()]
    assert abs(schemes.count("http") - schemes.count("https")) <= 4
    assert {"file", "data"} <= set(schemes)


def test_images_have_the_planned_sizes(world: World, rows: list[Row]) -> None:
    for row in rows:
        if row.file and row.kind != "exact_duplicate":
            with Image.open(world.images / row.file) as image:
                assert image.size == row.size_px


def test_a_second_call_returns_at_once(world: World) -> None:
    changed = world.marker.stat().st_mtime_ns
    assert make_world(world.directory, world.num_rows, world.seed) == world
    assert world.marker.stat().st_mtime_ns == changed


def test_a_killed_call_is_continued_with_the_same_bytes_in_two_processes(
    world: World, rows: list[Row], tmp_path: Path
) -> None:
    whole = _digests(world)
    shutil.copytree(world.images, tmp_path / "pictures")
    files = [row.file for row in rows if row.kind == "ok" and row.file]
    for lost in files[::2]:
        (tmp_path / "pictures" / lost).unlink()
    kept = tmp_path / "pictures" / files[1]
    written = kept.stat().st_mtime_ns
    again = make_world(tmp_path, world.num_rows, world.seed, world.http_port, world.https_port)
    assert _digests(again) == whole
    assert kept.stat().st_mtime_ns == written


def test_another_seed_leaves_no_image_and_a_taken_port_is_replaced(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.directory, tmp_path, dirs_exist_ok=True)
    with socket.socket() as taken:
        taken.bind(("127.0.0.3", 0))
        taken.listen()
        port = taken.getsockname()[1]
        second = make_world(tmp_path, 60, seed=2, http_port=port, https_port=0, num_processes=1)
    assert second.http_port != port
    assert open_world(tmp_path) == second
    after = _digests(second)
    assert not set(_digests(world).values()) & set(after.values())
    assert set(after) == {*(row.file for row in plan_rows(60, 2) if row.file), "made_for.json"}


def test_opening_a_folder_without_a_world_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished world"):
        open_world(tmp_path)


def test_the_demo_recipe_loads() -> None:
    recipe = load_recipe("demo")
    assert recipe.select.rules == {"min_side": 512, "min_aesthetic": 5.0, "max_watermark": 0.5}
    assert recipe.download.allow_private_hosts
