"""What was removed does not come back, whatever is built again or added; and an interrupted removal is finished."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from filters.decide.funnel import funnel
from filters.pipeline import STAGES
from filters.recipe_record import read_recipe
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import entries
from sdtrain.loading.latent_store import LatentStore
from tests.filters.removal_fixtures import (
    NUM_ROWS,
    build,
    check_consistent,
    entries_for,
    files_with,
    find_removal_of,
    make_photo,
    remove,
    rows_of,
    statuses,
    uid_of,
    url_of,
    write_metadata,
)


def test_what_comes_again_is_blocked_by_url_by_bytes_and_by_looks(dataset, photo_site):
    folder, port = photo_site
    remove(dataset, "uid", [uid_of(n, port) for n in (2, 6)], radius=4)
    shutil.copy(folder / "2.jpg", folder / "41.jpg")
    (folder / "42.jpg").write_bytes(make_photo(6, quality=75))
    write_metadata(dataset.root.parent / "metadata" / "b.parquet", port, [2, 6, 41, 42])
    build(dataset, read_recipe(dataset))
    rows = funnel(dataset, read_recipe(dataset), STAGES)
    assert [(r["stage"], r["dropped"]) for r in rows if r["reason"] == "removed"] == [
        ("select", 3 + 2),
        ("download", 1),
        ("decide", 1),
    ]
    assert {n: r for n, r in statuses(dataset, port).items() if n > NUM_ROWS} == {41: "removed", 42: "removed"}
    assert files_with(dataset.root / "selection", [uid_of(2, port), uid_of(6, port)]) == []


@pytest.mark.parametrize("by", ["url", "host"])
def test_a_new_selection_of_everything_leaves_it_out(dataset, photo_site, by):
    gone = {n for n in range(NUM_ROWS) if n % 4 == 0} | {20, 21} - {21} if by == "host" else {2}
    remove(dataset, by, entries_for(dataset, photo_site[1], by, sorted(gone)))
    recipe = read_recipe(dataset)
    recipe = recipe.model_copy(update={"select": recipe.select.model_copy(update={"seed": 7})})
    build(dataset, recipe)
    assert not gone & statuses(dataset, photo_site[1]).keys()
    assert {r["reason"]: r["dropped"] for r in funnel(dataset, recipe, STAGES)}["removed"] >= len(gone)


def test_whole_shards_may_go_and_the_dataset_can_still_grow(dataset, photo_site):
    port = photo_site[1]
    first = pq.read_table(dataset.selection(0))["url"].to_pylist()
    packed = pq.read_table(dataset.packed_table(1))["uid"].to_pylist()
    uids = [uid_of(n, port) for n in range(NUM_ROWS) if url_of(n, port) in first] + packed
    num = find_removal_of(dataset, uids).num_samples
    remove(dataset, "uid", uids)
    check_consistent(dataset, num)
    assert len(pq.read_table(dataset.selection(0))) == 0
    assert len(LatentStore(dataset.root, 32)) == sum(entry.num_out for entry in entries(dataset, "encode"))
    for path in (dataset.images_tar(0), dataset.images_table(0)):
        path.unlink()
    write_metadata(dataset.root.parent / "metadata" / "b.parquet", port, [*range(NUM_ROWS, NUM_ROWS + 3), 5])
    reports = build(dataset, read_recipe(dataset))
    assert ("download", 0, 0) in {(r.stage, r.shard, r.num_in) for r in reports}
    assert {41, 42} <= statuses(dataset, port).keys()


def test_a_packed_shard_that_is_lost_later_is_made_again_as_it_was(dataset, photo_site):
    remove(dataset, "uid", [uid_of(n, photo_site[1]) for n in (2, 9, 25, 30)])
    recipe = read_recipe(dataset)
    before = {path: path.read_bytes() for path in sorted((dataset.root / "dataset").iterdir())}
    for shard in range(len(entries(dataset, "pack"))):
        dataset.packed_tar(shard).unlink()
        dataset.packed_table(shard).unlink()
        assert {(r.stage, r.shard) for r in build(dataset, recipe)} == {("pack", shard)}
    assert {path: path.read_bytes() for path in sorted((dataset.root / "dataset").iterdir())} == before


def test_an_image_shard_that_is_lost_later_is_fetched_without_it(dataset, photo_site):
    (touched,) = remove(dataset, "url", [url_of(2, photo_site[1])]).touched["download"]
    dataset.images_tar(touched).unlink()
    before = rows_of(dataset)
    build(dataset, read_recipe(dataset))
    assert rows_of(dataset) == before
    assert 2 not in statuses(dataset, photo_site[1])


class Killed(BaseException):
    """What nobody catches."""


@pytest.mark.slow
def test_interrupted_at_any_rename_it_is_finished_by_the_next_build(dataset, photo_site, monkeypatch, tmp_path):
    uids = [uid_of(n, photo_site[1]) for n in (2, 4, 9, 25)]
    whole = DatasetDir(shutil.copytree(dataset.root, tmp_path / "whole"))
    remove(whole, "uid", uids)
    expected, num_steps = contents(whole), 0
    for num_steps in range(1, 200, 5):
        hurt = DatasetDir(shutil.copytree(dataset.root, tmp_path / "hurt"))
        if not interrupted(hurt, uids, num_steps, monkeypatch):
            break
        assert build(hurt, read_recipe(hurt)) == [] or num_steps == 1
        if num_steps > 1:
            assert contents(hurt) == expected
        shutil.rmtree(hurt.root)
    assert num_steps > 30


def contents(dataset: DatasetDir) -> dict[str, bytes]:
    folders = ("selection", "images", "scores", "dataset", "latents")
    paths = [p for folder in folders for p in (dataset.root / folder).iterdir()]
    found = {dataset.relative(p): p.read_bytes() for p in [*paths, dataset.decisions, dataset.duplicates]}
    # Where its statistics were lost, nobody knows when the download began.
    return {name: b"" if name.endswith("_stats.json") else content for name, content in found.items()}


def interrupted(dataset: DatasetDir, uids: list[str], num_steps: int, monkeypatch) -> bool:
    """Removes, and stops before the rename of that number."""
    steps, rename = iter(range(1, 10_000)), Path.replace

    def replace(path: Path, target: Path) -> Path:
        if next(steps) == num_steps:
            raise Killed
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        try:
            remove(dataset, "uid", uids)
        except Killed:
            return True
    return False
