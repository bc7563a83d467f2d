"""Own images become a dataset whose later stages need not know that they were imported."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from filters.build import open_build
from filters.build_options import BuildOptions
from filters.decide.funnel import remarks
from filters.importing import ImportOptions, open_import
from filters.inspect.status import dataset_status
from filters.pipeline import STAGES
from filters.recipe import load_recipe
from filters.recipe_record import read_recipe
from filters.remove.apply import finish_removal, start_removal
from filters.remove.plan import find_removal
from filters.select.stage import select_rows
from filters.select_config import SelectConfig
from sdtrain import cli
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.lock import lock_to_change
from sdtrain.dataset.manifest import entries
from sdtrain.dataset.stage import begin, pending, run_batch
from sdtrain.dataset.tars import read_samples
from sdtrain.errors import UserError
from sdtrain.model_card.records import dataset_facts
from tests.filters.importing.source_fixtures import (
    MIXED_URLS,
    WILD,
    image_rows,
    import_into,
    jpeg,
    mixed_source,
    write_files,
    write_tar,
)
from tests.sdtrain.download.download_fixtures import encoded, photo

WITHOUT_NETWORKS = {
    "name": "mine",
    "score": {f"{name}_weights": None for name in ("clip", "aesthetic", "watermark", "safety")},
    "duplicates": {"level": "exact"},
    "decide": {"rules": {"min_side": 8}, "decide_by": "image"},
    "pack": {"samples_per_shard": 5},
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """(folder of the source and all it was imported into, dataset, update) of a source of every kind."""
    folder = tmp_path_factory.mktemp("mixed")
    return folder, *import_into(folder / "data", mixed_source(folder / "My Photos"))


def build(dataset, recipe, until="pack"):
    """Runs the pipeline's stages as `sdtrain build` does; returns what was pending of the first two."""
    with open_build(recipe, BuildOptions(output=str(dataset.root)), "test") as work:
        due = {}
        for stage in STAGES[: [stage.name for stage in STAGES].index(until) + 1]:
            begin(stage, dataset)
            due[stage.name] = pending(stage, dataset, work.recipe)
            if due[stage.name]:
                run_batch(stage, dataset, work.recipe, due[stage.name])
        return due


def recipe_file(folder, content):
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_every_image_has_its_caption_or_its_reason_in_the_order_of_the_source(mixed):
    _, dataset, update = mixed
    found = {row["url"]: (row["caption"], row["reason"]) for row in image_rows(dataset)}
    assert found == {f"import://my-photos/{url}": row for url, row in MIXED_URLS.items()}
    assert list(found) == [f"import://my-photos/{url}" for url in MIXED_URLS]
    assert (update.num_new, update.num_known) == (len(MIXED_URLS), 0)


def test_counts_add_up_in_shards_of_equal_size(mixed):
    _, dataset, _ = mixed
    (selected,) = entries(dataset, "select")
    assert (selected.num_in, selected.num_out, selected.dropped) == (len(MIXED_URLS), len(MIXED_URLS), {})
    shards = list(entries(dataset, "download"))
    assert [shard.num_in for shard in shards] == [4, 4, 4, 3]
    dropped = Counter(reason for _, reason in MIXED_URLS.values() if reason)
    assert sum((Counter(shard.dropped) for shard in shards), Counter()) == dropped
    assert sum(shard.num_out for shard in shards) == len(MIXED_URLS) - dropped.total()


def test_identity_is_that_of_every_dataset_and_images_are_those_of_the_source(mixed):
    folder, dataset, _ = mixed
    rows = image_rows(dataset)
    for number, row in enumerate(rows):
        assert row["uid"] == hashlib.md5(f"{row['url']}\n{row['caption']}".encode()).hexdigest()
        assert row["key"] == f"{10 * (number // 4) + number % 4:06d}"
    stored = {key: members for n in range(4) for key, members in read_samples(dataset.images_tar(n))}
    by_url = {row["url"].removeprefix("import://my-photos/"): row for row in rows}
    for url, content in {"a.jpg": jpeg(1), "tars/0.tar#b.JPEG": jpeg(11)}.items():  # small JPEGs keep their bytes
        members = stored[by_url[url]["key"]]
        assert members["jpg"] == content
        assert members["txt"].decode() == by_url[url]["caption"]
        assert json.loads(members["json"])["url"] == by_url[url]["url"]
    # A file under two names is two images; their bytes show that they are one.
    assert by_url["a.jpg"]["sha256"] == by_url["again.jpg"]["sha256"] == hashlib.sha256(jpeg(1)).hexdigest()
    assert by_url["a.jpg"]["uid"] != by_url["again.jpg"]["uid"]
    png = Image.open(folder / "My Photos" / "c d#1.png")
    found = Image.open(io.BytesIO(stored[by_url["c%20d%231.png"]["key"]]["jpg"]))
    assert np.abs(np.asarray(png, int) - np.asarray(found, int)).mean() < 3


def test_what_is_passed_over_is_named_and_recorded(mixed):
    folder, dataset, update = mixed
    skipped = "\n".join(update.skipped)
    for sentence in (
        "hidden files and folders skipped: 3 (._a.jpg, .git, tars/0.tar#._b.jpg)",
        "links that lead out of the source skipped (--follow-links reads them): 1 (link.jpg)",
        "neither files nor folders, skipped: 1 (pipe.jpg)",
        "captions that are not utf-8, taken for none (--encoding names another): 1 (latin.txt)",
        "lines of metadata that are no JSON object: 1 (hub/metadata.jsonl, line 2)",
        "files that are neither images nor captions: 1 (notes.md)",
        "images without a caption (--require-caption drops them): 4 (import://my-photos/again.jpg, import://my-photos/dam",
    ):
        assert sentence in skipped
    recorded = remarks(dataset, read_recipe(dataset), STAGES)
    source = folder / "My Photos"
    said = f"imported from {source}: 15 images (the source has 4 in Parquet files, 8 in files, 3 in tars)"
    assert recorded[:2] == ["15 of 15 imported images selected", said]
    assert set(update.skipped) < set(recorded)
    assert f"imported from {source}" in dataset_status(dataset).recipe
    assert dataset_facts(dataset.root).source == "my-photos"


def test_a_second_run_does_nothing_and_what_is_added_gives_shards_of_its_own(mixed, digests):
    folder, dataset, _ = mixed
    source = folder / "grown"
    shutil.copytree(folder / "My Photos", source, symlinks=True, ignore=shutil.ignore_patterns("pipe.jpg"))
    copied = folder / "grown-data"
    shutil.copytree(dataset.root, copied)
    before = digests(dataset)
    again, update = import_into(copied, source, samples_per_shard=None)  # the source may move
    assert (update.num_new, update.num_known, update.missing.number, update.changed.number) == (0, 15, 0, 0)
    # What names the place of dataset and source.
    told = {"recipe.yaml", "metadata.duckdb"}
    assert {n: d for n, d in digests(again).items() if n not in told} == {
        name: digest for name, digest in before.items() if name not in told
    }
    write_files(source, {"new.jpg": jpeg(30), "new.txt": "new", "a.txt": "another caption"})
    (source / "B.JPEG").unlink()
    grown, update = import_into(copied, source, samples_per_shard=None)
    assert update.num_new == 1
    assert (update.missing.number, update.missing.urls) == (1, ("import://my-photos/B.JPEG",))
    assert (update.changed.number, update.changed.urls) == (1, ("import://my-photos/a.jpg",))
    after = digests(grown)
    assert all(after[name] == digest for name, digest in before.items() if name.startswith(("images", "selection")))
    assert [row["url"] for row in image_rows(grown)][15:] == ["import://my-photos/new.jpg"]
    with pytest.raises(UserError, match="imported from another source: none of its 16 images is in"):
        import_into(copied, write_files(folder / "other", {"x.jpg": jpeg(1)}), samples_per_shard=None)


def test_an_interrupted_import_goes_on_with_the_next_shard_and_ends_with_the_same_bytes(mixed, digests):
    folder, whole, _ = mixed
    output = folder / "interrupted"
    with pytest.raises(KeyboardInterrupt):
        import_into(output, folder / "My Photos", max_shards=2)
    before = {path: path.stat().st_mtime_ns for path in (output / "images").iterdir()}
    dataset, update = import_into(output, folder / "My Photos")
    assert update.num_new == 0
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in before.items())
    parts = ("images/0", "selection", "import")
    stats = "_stats.json"  # holds times
    expected = {n: d for n, d in digests(whole).items() if n.startswith(parts) and not n.endswith(stats)}
    assert {n: d for n, d in digests(dataset).items() if n.startswith(parts) and not n.endswith(stats)} == expected


def test_a_build_goes_on_from_the_imported_images_without_them(mixed, tmp_path):
    _folder, imported, _ = mixed
    dataset = type(imported)(tmp_path / "data")
    shutil.copytree(imported.root, dataset.root)  # to another place, whose recipe names the former one
    content = WITHOUT_NETWORKS | {"select": {"samples_per_shard": 4}}
    due = build(dataset, load_recipe(str(recipe_file(tmp_path, content))))
    assert (due["select"], due["download"]) == ([], [])
    packed = [members for n in range(3) for _, members in read_samples(dataset.packed_tar(n))]
    urls = {json.loads(members["json"])["url"].removeprefix("import://my-photos/") for members in packed}
    # again.jpg and inside.jpg are copies of a.jpg
    expected = {url for url, (_, reason) in MIXED_URLS.items() if not reason}
    assert len(packed) == len(expected) - 2
    assert urls < expected
    assert expected - urls < {"a.jpg", "again.jpg", "inside.jpg"}
    assert read_recipe(dataset).source.name == "my-photos"
    assert "imported from" in dataset.report.read_text()


def test_removed_images_stay_away(mixed, tmp_path):
    folder, imported, _ = mixed
    dataset = type(imported)(tmp_path / "data")
    shutil.copytree(imported.root, dataset.root)
    (tmp_path / "list.txt").write_text("import://my-photos/a.jpg\n")
    with lock_to_change(dataset, "test"):
        removal = find_removal(dataset, tmp_path / "list.txt", "url", None)
        assert removal.has_effect
        start_removal(dataset, removal)
        finish_removal(dataset)
    _, update = import_into(dataset.root, folder / "My Photos")
    assert update.num_new == 0
    assert "import://my-photos/a.jpg" not in {row["url"] for row in image_rows(dataset)}


def test_settings_are_kept_and_captions_may_be_required(tmp_path):
    source = write_files(
        tmp_path / "in",
        {"a.jpg": jpeg(1), "a.json": '{"alt": "x", "long": "caf\xe9"}'.encode("latin-1"), "b.jpg": jpeg(2)},
    )
    settings = {"columns": {"caption": "long"}, "encoding": "latin-1"}
    dataset, _ = import_into(tmp_path / "out", source, settings=settings, require_caption=True)
    assert [(row["url"], row["caption"]) for row in image_rows(dataset)] == [("import://in/a.jpg", "café")]
    (selected,) = entries(dataset, "select")
    assert selected.dropped == {"min_caption_chars": 1}
    write_files(source, {"c.jpg": jpeg(3), "c.json": '{"long": "\xe9"}'.encode("latin-1")})
    import_into(tmp_path / "out", source)
    assert [row["caption"] for row in image_rows(dataset)] == ["café", "é"]


def test_tables_of_captions_beside_the_images(tmp_path):
    source = write_files(
        tmp_path / "in",
        {
            "csv/metadata.csv": '\ufefffile_name,text\na.jpg,"two\nlines, quoted"\n../b.jpg,up\n'
            "../../c.jpg,out\ngone.jpg,x\n",
            "csv/a.jpg": jpeg(1),
            "b.jpg": jpeg(2),
            "parquet/c.jpg": jpeg(3),
            "other/metadata.csv": "picture,label\nd.jpg,4\n",
        },
    )
    table = pa.table({"file_name": ["c.jpg"], "caption": [["", "the first of several", "another"]]})
    pq.write_table(table, source / "parquet" / "metadata.parquet")
    dataset, update = import_into(tmp_path / "out", source)
    captions = {row["url"].rpartition("/")[2]: row["caption"] for row in image_rows(dataset)}
    assert captions == {"a.jpg": "two\nlines, quoted", "b.jpg": "up", "c.jpg": "the first of several"}
    assert update.skipped == [
        "files named by metadata that lie outside the source: 1 (csv/metadata.csv: ../c.jpg)",
        "rows of metadata without file_name and a caption (--columns caption=NAME): 1 (other/metadata.csv: "
        "picture, label)",
        "files named by metadata that are not there: 1 (csv/gone.jpg)",
    ]


def test_tars_give_the_captions_and_pixels_that_webdataset_reads(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    members = {
        "x/0.v2.jpg": jpeg(1),
        "x/0.v2.txt": "dotted",
        "1.JPEG": jpeg(2),
        "1.txt": "upper case",
        "2.png": encoded(photo(3), "png"),
        "2.txt": "a png",
    }
    tar = write_tar(tmp_path / "00000.tar", members)
    dataset, _ = import_into(tmp_path / "out", tar)
    stored = {row["url"]: row for row in image_rows(dataset)}
    bodies = dict(read_samples(dataset.images_tar(0)))
    num_compared = 0
    for sample in webdataset.WebDataset(str(tar), shardshuffle=False).decode("rgb8"):
        (extension,) = (name for name in sample if name.endswith(("jpg", "jpeg", "png")))
        (text,) = (value for name, value in sample.items() if name.endswith("txt"))
        names = [name for name in members if name.lower() == f"{sample['__key__']}.{extension}"]
        row = stored[f"import://00000/00000.tar#{names[0]}"]
        assert row["caption"] == text
        found = np.asarray(Image.open(io.BytesIO(bodies[row["key"]]["jpg"])), int)
        assert np.abs(found - sample[extension]).mean() < (3 if extension == "png" else 1e-9)
        num_compared += 1
    assert num_compared == len(stored) == 3


@pytest.mark.skipif(not WILD.exists(), reason="no files from outside")
def test_a_tar_from_outside_with_dots_in_its_keys(tmp_path):
    dataset, _ = import_into(tmp_path / "out", WILD / "dotted-keys.tar")
    found = [(row["url"].partition("#")[2], row["caption"], row["reason"]) for row in image_rows(dataset)]
    assert found == [("photo.v2.jpg", "a picture", None), ("b.jpeg", "another", None)]


def test_what_img2dataset_wrote_is_imported_from_its_tars_with_its_table_passed_over(tmp_path):
    row = json.dumps({"caption": "kept", "url": "https://example.com/0.jpg", "key": "000000000"})
    write_tar(tmp_path / "in" / "00000.tar", {"000000000.jpg": jpeg(1), "000000000.json": row, "000000000.txt": "kept"})
    pq.write_table(pa.table({"key": ["000000000"], "caption": ["kept"]}), tmp_path / "in" / "00000.parquet")
    write_files(tmp_path / "in", {"00000_stats.json": "{}"})
    dataset, update = import_into(tmp_path / "out", tmp_path / "in")
    assert [(row["url"], row["caption"]) for row in image_rows(dataset)] == [
        ("import://in/00000.tar#000000000.jpg", "kept")
    ]
    assert update.skipped == ["Parquet without a column of image bytes: 1 (00000.parquet: key, caption)"]


@pytest.mark.parametrize(
    ("files", "columns", "message"),
    [
        ({"notes.txt": "x"}, {}, "holds no image that could be imported .the folder is empty"),
        ({"notes.md": "x"}, {}, r"neither images nor captions: 1 \(notes.md\)"),
        ({"a.parquet": "no table"}, {}, "a.parquet cannot be read as Parquet"),
        ({"metadata.csv": b"file_name,text\na.jpg,caf\xe9\n", "a.jpg": jpeg(1)}, {}, "cannot be read as utf-8"),
        ({"table": ["image", "other"]}, {}, "several columns of images: image, other. Choose one: --columns image="),
        ({"table": ["image"]}, {"image": "img"}, "no column img with the bytes of images"),
        ({"table": ["image"]}, {"caption": "alt"}, "no column alt for captions. It has: image, text"),
    ],
)
def test_what_cannot_be_imported_is_refused_before_anything_is_made(tmp_path, files, columns, message):
    source = tmp_path / "in"
    source.mkdir()
    if names := files.pop("table", None):
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        stored = {name: pa.array([{"bytes": jpeg(1), "path": None}], kind) for name in names}
        if len(names) > 1:
            stored["first"] = stored.pop("image")
            message = message.replace("image, other", "other, first")
        pq.write_table(pa.table(stored | {"text": ["x"]}), source / "t.parquet")
    write_files(source, files)
    with pytest.raises(UserError, match=message):
        import_into(tmp_path / "out", source, settings={"columns": columns})
    assert not list((tmp_path / "out").glob("import/*"))


def test_what_does_not_go_together_is_refused(mixed, tmp_path):
    folder, dataset, _ = mixed
    source = folder / "My Photos"
    for options, message in (
        (ImportOptions(source, str(source / "data")), "lies in the source"),
        (ImportOptions(source / "none", "out"), "There is no file or folder"),
        (ImportOptions(source / "a.jpg", "out"), "neither a tar nor a Parquet file"),
        (ImportOptions("https://example.com/a", "out"), "is a URL"),
        (ImportOptions(source, str(tmp_path / "o"), settings={"encoding": "utf-9"}), "not an encoding that Python"),
        (ImportOptions(source, str(tmp_path / "o"), settings={"name": "a/b"}), "'name' is 'a/b'"),
    ):
        with pytest.raises(UserError, match=message), open_import(options):
            pass
    path = recipe_file(tmp_path, WITHOUT_NETWORKS | {"decide": {"rules": {"min_aesthetic": 5}}})
    with pytest.raises(
        UserError, match=r"rule 'min_aesthetic' of `decide` looks at the metadata's. Set `decide_by: im"
    ):
        import_into(tmp_path / "o", source, recipe=str(path))
    path = recipe_file(tmp_path, WITHOUT_NETWORKS | {"select": {"rules": {"min_aesthetic": 5}}})
    with pytest.raises(UserError, match=r"Rule 'min_aesthetic' of `select` looks at aesthetic, .* to `decide`"):
        import_into(tmp_path / "o", source, recipe=str(path))
    path = recipe_file(tmp_path, WITHOUT_NETWORKS | {"select": {"rules": {"languages": ["en"]}}})
    with pytest.raises(UserError, match=r"looks at language, .* Leave it out"):
        import_into(tmp_path / "o", source, recipe=str(path))
    metadata = WITHOUT_NETWORKS | {"select": {"metadata": "elsewhere"}}
    with pytest.raises(UserError, match="no metadata can be added"):
        build(dataset, load_recipe(str(recipe_file(tmp_path, metadata))))
    recorded = load_recipe(str(dataset.recipe))
    with pytest.raises(UserError, match=r"does not hold them yet\. Import them first"):
        build(type(dataset)(tmp_path / "elsewhere"), recorded)


def test_the_command(mixed, tmp_path, capsys, monkeypatch):
    source = write_files(tmp_path / "in", {"a.jpg": jpeg(1), "a.txt": "x", "b.jpg": jpeg(2)})
    arguments = ["sdtrain", "import", str(source), "--output", str(tmp_path / "out"), "--require-caption"]
    for expected in (
        ["source: 2 new images", "1 in, 1 out, none dropped", "To go on: sdtrain build"],
        ["source: 0 new images, 2 known before", "download: finished before"],
    ):
        monkeypatch.setattr("sys.argv", arguments)
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 0
        out = capsys.readouterr().out
        assert all(words in out for words in expected), out
    monkeypatch.setattr("sys.argv", [*arguments, "--columns", "img=a"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "image=NAME" in capsys.readouterr().err


def test_metadata_from_elsewhere_cannot_name_files_of_this_machine(tmp_path):
    write_files(tmp_path, {"in/secret.jpg": jpeg(1)})
    urls = [f"import://in/{tmp_path}/in/secret.jpg", f"file://{tmp_path}/in/secret.jpg", "https://example.com/a.jpg"]
    table = pa.table({"url": urls, "text": list("abc"), "sdtrain_source_row": [0, 1, 2]})
    pq.write_table(table, tmp_path / "metadata.parquet")
    report = select_rows(DatasetDir(tmp_path / "out"), SelectConfig(metadata=str(tmp_path / "metadata.parquet")))
    assert (report.num_out, report.dropped) == (1, {"url_not_allowed": 2})


@pytest.mark.slow
def test_killed_at_any_moment_an_import_ends_with_the_same_bytes(mixed, digests):
    folder, whole, _ = mixed
    output, killed = folder / "killed", 0
    command = [sys.executable, "-m", "sdtrain.cli", "import", str(folder / "My Photos"), "--output", str(output)]
    for wait_s in (1.0, 2.0, 3.0, 4.0, 5.0):
        process = subprocess.Popen([*command, "--samples-per-shard", "4"], start_new_session=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait_s)
        killed += process.poll() is None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert killed
    dataset, _ = import_into(output, folder / "My Photos")
    parts = ("images/0", "selection", "import")
    made = [{n: d for n, d in digests(data).items() if n.startswith(parts)} for data in (whole, dataset)]
    for found in made:
        for name in [name for name in found if name.endswith("_stats.json")]:  # which holds times
            del found[name]
    assert made[0] == made[1]
