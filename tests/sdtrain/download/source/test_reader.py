"""Bytes are read from the source as it was listed, or there is a reason; and from nowhere else."""

import io
import os
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdtrain.dataset.config import SourceConfig
from sdtrain.dataset.layout import DatasetDir
from sdtrain.download.http.failures import FetchError
from sdtrain.download.source import walk
from sdtrain.download.source.captions import Captions
from sdtrain.download.source.catalogue import (
    ROWS_PER_GROUP,
    SCHEMA,
    Catalogue,
    escape,
    last_source_row,
    unescape,
    write_catalogue,
)
from sdtrain.download.source.reader import SourceReader, SourceRequest
from sdtrain.download.source.tables import TableImages, open_table, read_captions
from sdtrain.download.source.tars import TarImages
from sdtrain.download.source.update import update_catalogues
from sdtrain.errors import UserError

LIMIT = 1000


def listed(folder, files, follow_links=False):
    """(reader, URL -> row) of a source with these files, listed."""
    source, dataset = folder / "in", DatasetDir(folder / "out")
    for name, content in files.items():
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    update_catalogues(dataset, SourceConfig(path=str(source), name="in", follow_links=follow_links))
    request = SourceRequest(path=source, catalogues=dataset.catalogues, follow_links=follow_links, max_bytes=LIMIT)
    table = pq.read_table(dataset.catalogue(0))
    return SourceReader(request), dict(
        zip(table["url"].to_pylist(), table["sdtrain_source_row"].to_pylist(), strict=True)
    )


def reason(reader, rows, url):
    with pytest.raises(FetchError) as failure:
        reader.read(rows[f"import://in/{url}"], f"import://in/{url}")
    return failure.value.reason


def tar_of(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, body in members:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return buffer.getvalue()


def table_of(images, **options):
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": pa.array(images, pa.binary())}), buffer, **options)
    return buffer.getvalue()


def test_a_file_that_is_not_as_it_was_listed_has_a_reason(tmp_path):
    names = ["a.jpg", "gone.jpg", "grown.jpg", "pipe.jpg", "moved.jpg", "empty.jpg", "large.jpg"]
    files = dict.fromkeys(names, b"body") | {"empty.jpg": b"", "large.jpg": bytes(LIMIT + 1)}
    reader, rows = listed(tmp_path, files)
    source = tmp_path / "in"
    (source / "grown.jpg").write_bytes(b"another body")
    for name in ("gone.jpg", "pipe.jpg", "moved.jpg"):
        (source / name).unlink()
    (tmp_path / "secret.jpg").write_bytes(b"body")
    (source / "moved.jpg").symlink_to(tmp_path / "secret.jpg")
    os.mkfifo(source / "pipe.jpg")  # opened without waiting for somebody to write
    assert reader.read(rows["import://in/a.jpg"], "import://in/a.jpg") == b"body"
    assert {name: reason(reader, rows, name) for name in names[1:]} == {
        "gone.jpg": "source_missing",
        "grown.jpg": "source_changed",
        "pipe.jpg": "source_changed",
        "moved.jpg": "source_unreadable",
        "empty.jpg": "empty_body",
        "large.jpg": "too_large",
    }


@pytest.mark.parametrize("follow_links", [False, True])
@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd", "x/../../secret.jpg"])
def test_a_list_that_was_tampered_with_reads_nothing_outside_the_source(tmp_path, name, follow_links):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    schema = pa.schema([field for field in SCHEMA if field.name != "sdtrain_source_row"])
    batch = pa.RecordBatch.from_pylist([{"url": "import://in/a.jpg", "source_file": name}], schema)
    write_catalogue(tmp_path / "00000.parquet", [batch], first_row=0, remarks=[])
    request = SourceRequest(path=tmp_path / "in", catalogues=tmp_path, follow_links=follow_links, max_bytes=LIMIT)
    assert reason(SourceReader(request), {"import://in/a.jpg": 0}, "a.jpg") == "source_unreadable"


def test_links_that_lead_out_are_read_if_asked_for(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.jpg").write_bytes(b"blob")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "folder").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "link.jpg").symlink_to(tmp_path / "elsewhere" / "b.jpg")
    reader, rows = listed(tmp_path, {}, follow_links=True)
    assert sorted(rows) == ["import://in/folder/b.jpg", "import://in/link.jpg"]
    assert {reader.read(row, url) for url, row in rows.items()} == {b"blob"}


def test_a_tar_may_grow_but_not_change_and_gives_what_is_whole(tmp_path):
    members = [("0.jpg", b"first"), ("0.txt", b"caption"), ("1.jpg", b"second")]
    cut = tar_of(members)[: 5 * 512 + 3]  # within the last body
    reader, rows = listed(tmp_path, {"t.tar": tar_of(members), "cut.tar": cut})
    urls = ["import://in/t.tar#0.jpg", "import://in/t.tar#1.jpg"]
    (tmp_path / "in" / "t.tar").write_bytes(tar_of([*members, ("2.jpg", b"third")]))
    assert [reader.read(rows[url], url) for url in reversed(urls)] == [b"second", b"first"]
    assert reader.read(rows["import://in/cut.tar#0.jpg"], "import://in/cut.tar#0.jpg") == b"first"
    assert reason(reader, rows, "cut.tar#1.jpg") == "truncated"
    reader.close()
    (tmp_path / "in" / "t.tar").write_bytes(tar_of([("x.jpg", b"longer than before"), *members]))
    assert reason(reader, rows, "t.tar#1.jpg") == "source_changed"


def test_a_table_is_read_in_any_order_and_holds_few_images_at_once(tmp_path):
    images = [b"%d" % n for n in range(100)]
    path = tmp_path / "t.parquet"
    path.write_bytes(table_of(images, row_group_size=40))
    table = TableImages(path, "image")
    order = [0, 1, 17, 39, 40, 99, 3, 41, 40]
    assert [table(row) for row in order] == [images[row] for row in order]
    assert len(table._rows) <= 16
    with pytest.raises(FetchError, match="fewer rows"):
        table(100)
    table.close()


def test_a_damaged_table_loses_its_images_and_not_the_shard(tmp_path):
    content = bytearray(table_of([bytes([n]) * 200 for n in range(4)], compression="none", use_dictionary=False))
    reader, rows = listed(tmp_path, {"t.parquet": bytes(content)})
    content[4:200] = b"\xff" * 196
    (tmp_path / "in" / "t.parquet").write_bytes(content)
    assert reason(reader, rows, "t.parquet#1") == "source_unreadable"


def test_names_of_all_kinds_keep_their_own_url():
    names = ["a b", "a%20b", "a#1", "ä?", "a\n", b"caf\xe9".decode("utf-8", "surrogateescape"), "\u2028x", "日本"]
    escaped = [escape(name) for name in names]
    assert [unescape(text) for text in escaped] == names
    assert len(set(escaped)) == len(names)
    assert all(text.isprintable() and not set(text) & set("#? ") for text in escaped)
    assert escaped[-1] == "日本"


def test_catalogues_have_the_same_bytes_however_rows_arrive(tmp_path):
    rows = [{"url": f"import://in/{n}.jpg", "source_file": f"{n}.jpg"} for n in range(2 * ROWS_PER_GROUP + 5)]
    schema = pa.schema([field for field in SCHEMA if field.name != "sdtrain_source_row"])
    batch = pa.RecordBatch.from_pylist(rows, schema)
    (tmp_path / "import").mkdir()
    paths = [tmp_path / "import" / f"0000{n}.parquet" for n in range(2)]
    for path, size in zip(paths, (len(rows), 777), strict=True):
        parts = (batch.slice(begin, size) for begin in range(0, len(rows), size))
        assert write_catalogue(path, parts, first_row=0, remarks=["x"]) == len(rows)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    write_catalogue(paths[1], [batch.slice(0, 3)], first_row=len(rows), remarks=[])
    assert last_source_row(paths[1]) == len(rows) + 2
    catalogue = Catalogue(tmp_path / "import")
    for row in (0, ROWS_PER_GROUP, len(rows) - 1):
        assert catalogue.place(row, rows[row]["url"]).source_file == f"{row}.jpg"
    assert catalogue.place(len(rows) + 2, "import://in/2.jpg").source_file == "2.jpg"
    with pytest.raises(UserError, match=r"does not have import://in/none.jpg"):
        catalogue.place(1, "import://in/none.jpg")


def test_what_cannot_be_read_is_counted_and_named_and_the_rest_is_listed(tmp_path, monkeypatch):
    for name in ("a.jpg", "locked.jpg", "shut/b.jpg", "z/c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"body")
    scandir = os.scandir

    def refuse(path):
        if path.endswith("/shut"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    # As root, who may be running this, every file is readable.
    monkeypatch.setattr(walk.os, "scandir", refuse)
    monkeypatch.setattr(walk.os, "access", lambda path, mode: not path.endswith("locked.jpg"))
    skipped = walk.Skipped()
    folders = list(walk.Walk(tmp_path, follow_links=False, skipped=skipped))
    assert [(folder.path, list(folder.files)) for folder in folders] == [
        ("", ["a.jpg"]),
        ("shut", []),
        ("z", ["c.jpg"]),
    ]
    assert skipped.remarks() == [
        "files that cannot be read: 1 (locked.jpg)",
        "folders that cannot be read: 1 (shut: Permission denied)",
    ]


def test_text_of_a_table_that_is_no_utf8_costs_its_own_row(tmp_path):
    raw = pa.array([b"good", b"caf\xe9", b"good too"])
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(pa.table({"image": pa.array([b"1", b"2", b"3"]), "text": text}), tmp_path / "t.parquet")
    skipped = walk.Skipped()
    source = SourceConfig(path=str(tmp_path), name="in")
    captions = Captions(source, skipped)
    table = open_table(tmp_path / "t.parquet", source, captions)
    assert list(read_captions(tmp_path / "t.parquet", table, captions)) == ["good", None, "good too"]
    assert skipped.remarks() == [
        "captions that are not utf-8, taken for none (--encoding names another): 1 (t.parquet)"
    ]


def test_a_tar_of_garbage_is_named_and_holds_no_image(tmp_path):
    (tmp_path / "t.tar").write_bytes(b"\xff" * 5000)
    (tmp_path / "empty.tar").write_bytes(b"")
    skipped = walk.Skipped()
    for name in ("t.tar", "empty.tar"):
        images = TarImages(tmp_path / name, name, Captions(SourceConfig(path=".", name="in"), skipped), skipped)
        assert list(images) == []
    assert skipped.counts == {"tars damaged or cut short, read up to there": 2}
