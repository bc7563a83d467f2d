"""Metadata in CSV, TSV and JSON lines: the selection of Parquet with the same rows, or a fault's file and line."""

import csv
import gzip
import io
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from filters.inspect.query import ask
from filters.inspect.views import write_views
from filters.recipe import Recipe
from filters.recipe_record import record_recipe
from filters.select.metadata_files import find_metadata, remarks_on
from filters.select.stage import SELECT
from filters.select_config import SelectConfig
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.stage import pending, run_batch
from sdtrain.errors import UserError
from tests.filters.select.metadata_fixtures import rows_of, select, url, write

WILD = Path(__file__).parents[4] / "shared" / "data" / "wild"
CAPTIONS = [
    "plain",
    'with "quotes", and commas',
    "two\nlines",
    None,
    "semicolon; tab\there | bar",
    "Ä 😀",
    " spaces ",
    "5'",
]
RULES = {"min_side": 512.0, "min_aesthetic": 5.0}
ROWS = [
    {"URL": url(i), "TEXT": CAPTIONS[i % 8], "WIDTH": 500 + i, "HEIGHT": 900, "AESTHETIC_SCORE": 4 + i / 16, "hash": -i}
    for i in range(40)
] + [{"URL": None, "TEXT": "t", "WIDTH": 900, "HEIGHT": 900, "AESTHETIC_SCORE": 9.5, "hash": None}]


def as_table(separator, newline="\n", **names):
    text = io.StringIO()
    writer = csv.writer(text, delimiter=separator, lineterminator=newline)
    writer.writerow(names.get(name, name) for name in ROWS[0])
    writer.writerows(row.values() for row in ROWS)
    return text.getvalue()


def as_lines(**names):
    return "".join(json.dumps({names.get(name, name): value for name, value in row.items()}) + "\n" for row in ROWS)


def zstd(text):
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as compressed:
        compressed.write(text.encode())
    return out.getvalue().to_pybytes()


FILES = {
    "a.csv": as_table(",").encode(),
    "a.tsv": as_table("\t").encode(),
    "semicolons.csv": as_table(";").encode(),
    "bars.csv": as_table("|").encode(),
    "tabs-in-a.csv": as_table("\t").encode(),
    "bom-and-crlf.CSV": as_table(",", "\r\n").encode("utf-8-sig"),
    "header-with-spaces.csv": as_table(",", URL=" url", TEXT="Caption ").encode(),
    "a.csv.gz": gzip.compress(as_table(",").encode()),
    "A.TSV.GZ": gzip.compress(as_table("\t").encode("utf-8-sig")),
    "a.csv.zst": zstd(as_table(",")),
    "a.jsonl": as_lines().encode(),
    "bom.jsonl": as_lines().encode("utf-8-sig"),
    "crlf-and-blank.ndjson": as_lines().replace("\n", "\r\n\r\n").encode(),
    "a.jsonl.gz": gzip.compress(as_lines(TEXT="caption").encode()),
    "table-of-another.ending": as_table(",").encode(),
    "lines-of-another.ending": as_lines().encode(),
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parquet")
    write(folder / "metadata" / "a.parquet", **{name: [row[name] for row in ROWS] for name in ROWS[0]})
    dataset, report = select(folder, rules=RULES, samples_per_shard=16)
    assert {row["caption"] for row in rows_of(dataset)} == {text or "" for text in CAPTIONS}
    return report


@pytest.mark.parametrize("name", FILES)
def test_the_selection_has_the_bytes_of_that_from_parquet(tmp_path, expected, name):
    (tmp_path / name).write_bytes(FILES[name])
    _, report = select(tmp_path, metadata=str(tmp_path / name), rules=RULES, samples_per_shard=16)
    assert (report.outputs, report.dropped, report.num_in) == (expected.outputs, expected.dropped, 41)


def test_a_folder_of_several_forms_is_read_whole_and_parquet_stands_alone(tmp_path, expected):
    folder = tmp_path / "metadata"
    folder.mkdir()
    half = len(ROWS) // 2
    (folder / "a.CSV").write_text("\n".join(["URL,WIDTH,HEIGHT,AESTHETIC_SCORE,hash", f"{url(0)},900,900,9,1"]) + "\n")
    with pytest.raises(UserError, match=r"a\.CSV has no column TEXT or CAPTION"):
        select(tmp_path)
    header, *lines = as_table(";").replace("two\nlines", "two␤lines").splitlines()
    (folder / "a.CSV").write_text("\n".join([header, *lines[:half]]).replace("␤", "\n"))
    (folder / "b.ndjson").write_text("\n".join(as_lines().splitlines()[half:]))
    _, report = select(tmp_path, rules=RULES, samples_per_shard=16)
    assert report.outputs == expected.outputs
    write(folder / "only.parquet", URL=[url(1)], TEXT=["t"])
    _, report = select(tmp_path, "again")
    assert report.num_in == 1
    assert "2 files of text beside 1 Parquet files not read" in report.notes
    with pytest.raises(UserError, match=r"only\.parquet has no column"):  # a glob means every file
        select(tmp_path, "whole", metadata=f"{folder}/*", rules=RULES)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("short.csv", "url,caption,x\nhttp://e.com/1,a,1\nhttp://e.com/2,b\n", r"short\.csv, line 3: 2 values, .*s 3"),
        ("long.tsv", "url\tcaption\nhttp://e.com/1\ta\tb\n", r"long\.tsv, line 2: 3 values, .* names 2"),
        ("quote.csv", 'url,caption\nhttp://e.com/1,"a" b\n', r"quote\.csv, line 2: a quoted value does not end"),
        ("mixed.csv", "url,caption\nhttp://e.com/1,a\r\nhttp://e.com/2,b\r\n", r"mixed\.csv.*lines end in diff"),
        ("latin.csv", "url,caption\nhttp://e.com/1,café\n".encode("latin-1"), r"latin\.csv, line 2: .* not UTF-8"),
        ("wide.csv", "url,caption\nhttp://e.com/1,a\n".encode("utf-16"), r"wide\.csv is UTF-16. Convert it: iconv"),
        ("wide.jsonl", b"\xfe\xff" + '{"url":"x"}\n'.encode("utf-16-be"), r"wide\.jsonl is UTF-16"),
        ("rows.csv", "http://e.com/1,a\n", r"rows\.csv, line 1: a row, where the names of the columns"),
        ("twice.csv", "url,caption,url\n", r"twice\.csv, line 1: there are two columns url"),
        ("case.csv", "url,caption,URL\n", r"case\.csv has two columns that differ in case only: url and URL"),
        ("head.jsonl", '{"url": "http://e.com/1", "caption": "a"}\n{"url": \n', r"head\.jsonl, line 2: not JSON"),
        ("array.jsonl", '[{"url": "x"}]\n', r"array\.jsonl, line 1: not an object"),
        ("empty.csv", "", r"empty\.csv has no column URL"),
        ("header.csv", "url,caption\n", r"header\.csv has no rows"),
        ("not.csv.gz", b"\x00\x01\x02\x03", r"not\.csv\.gz cannot be read"),
        ("list.jsonl", '{"url": "http://e.com/1", "caption": ["a", "b"]}\n', r"list\.jsonl: column caption holds"),
    ],
)  # fmt: skip
def test_a_fault_is_named_by_file_and_line(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=words):
        select(tmp_path, metadata=str(tmp_path / name))


def test_a_line_that_is_no_json_is_found_far_from_the_first(tmp_path):
    lines = [json.dumps({"url": url(i), "caption": "t"}) for i in range(1500)]
    (tmp_path / "late.jsonl").write_text("\n".join([*lines[:1200], "", '{"url": "', *lines[1200:]]))
    with pytest.raises(UserError, match=r"late\.jsonl, line 1202: not a JSON object"):
        select(tmp_path, metadata=str(tmp_path / "late.jsonl"))


def test_nested_columns_are_refused_for_captions_and_harmless_elsewhere(tmp_path):
    write(tmp_path / "metadata" / "a.parquet", URL=[url(1)], TEXT=[["a", "b"]], boxes=[[{"x": 1}]])
    with pytest.raises(UserError, match=r"a\.parquet: column TEXT holds lists or objects, and caption is one value"):
        select(tmp_path)
    line = {"url": url(1), "caption": "t", "boxes": [{"x": 1}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    assert rows_of(select(tmp_path, metadata=str(tmp_path / "a.jsonl"))[0])[0]["caption"] == "t"


def test_a_finished_selection_is_known_again_and_a_changed_text_selects_anew(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text(f"url,caption\n{url(1)},t\n")
    dataset, recipe = DatasetDir(tmp_path / "data"), Recipe(name="r", select=SelectConfig(metadata=str(file)))
    run_batch(SELECT, dataset, recipe, [0])
    assert pending(SELECT, dataset, recipe) == []
    (tmp_path / "b").mkdir()
    moved = recipe.select.model_copy(update={"metadata": shutil.copy(file, tmp_path / "b")})
    assert pending(SELECT, dataset, recipe.model_copy(update={"select": moved})) == []
    file.write_text(f"url,caption\n{url(1)},u\n")
    assert pending(SELECT, dataset, recipe) == [0]


def test_scores_may_be_joined_from_text(tmp_path):
    write(tmp_path / "metadata" / "a.parquet", URL=list(map(url, range(4))), TEXT=["t"] * 4)
    (tmp_path / "scores.csv").write_text(
        "url,caption,aesthetic_score\n" + "".join(f"{url(i)},t,{i}.5\n" for i in range(3))
    )
    joins = [{"files": str(tmp_path / "scores.csv"), "by": "url_caption"}]
    dataset, report = select(tmp_path, joins=joins, rules={"min_aesthetic": 1.0})
    assert {row["url"]: row["aesthetic"] for row in rows_of(dataset)} == {url(1): 1.5, url(2): 2.5}
    assert report.dropped == {"aesthetic_missing": 1, "min_aesthetic": 1}


def test_names_of_columns_are_mapped_and_suggested(tmp_path):
    (tmp_path / "a.jsonl").write_text(as_lines(URL="image_url", TEXT="raw_caption"))
    settings = {"metadata": str(tmp_path / "a.jsonl"), "rules": RULES}
    with pytest.raises(
        UserError, match=r"a\.jsonl has no column URL.*select\.columns: \{url: image_url, caption: raw_caption\}"
    ):
        select(tmp_path, **settings)
    columns = {"url": "image_url", "caption": "Raw_Caption"}
    dataset, report = select(tmp_path, columns=columns, **settings)
    assert (report.num_in, len(rows_of(dataset))) == (41, report.num_out)
    with pytest.raises(
        UserError, match=r"select\.columns: url: picture: .*a\.jsonl has no column picture. It has: image_url"
    ):
        select(tmp_path, columns={"url": "picture"}, **settings)
    with pytest.raises(ValueError, match=r"'ulr' is none of our columns. Did you mean 'url'"):
        SelectConfig(columns={"ulr": "x"})


def test_any_column_is_mapped_from_parquet_before_usual_names_and_rules_see_it(tmp_path):
    write(
        tmp_path / "metadata" / "a.parquet",
        URL=[url(1), url(2)],
        TEXT=["a", "b"],
        alt=["c", "d"],
        **{"w px": [600, 60], "h px": [700, 700]},
    )
    with pytest.raises(UserError, match=r"has no column ORIGINAL_WIDTH or WIDTH"):
        select(tmp_path, rules={"min_side": 512})
    columns = {"caption": "alt", "width": "w px", "height": "h px"}
    dataset, report = select(tmp_path, rules={"min_side": 512}, columns=columns)
    assert [(row["caption"], row["width"]) for row in rows_of(dataset)] == [("c", 600)]
    assert report.dropped == {"min_side": 1}


@pytest.mark.parametrize("reserved", ["file_row_number", "filename", "uid", "key", "reason", "side", "shard", "key_0"])
def test_names_that_we_or_duckdb_use_may_be_columns_of_the_metadata(tmp_path, reserved):
    write(
        tmp_path / "metadata" / "a.parquet",
        URL=[url(1), url(2)],
        TEXT=["a", "b"],
        WIDTH=[9, 9],
        HEIGHT=[9, 5],
        **{reserved: [7, 7]},
    )
    write(tmp_path / "metadata" / "b.parquet", URL=[url(3)], TEXT=["a"], WIDTH=[9], HEIGHT=[9])
    blocked = tmp_path / "block.txt"
    blocked.write_text(f"{url(3)}\n")
    for settings in ({}, {"blocklists": [{"files": str(blocked), "by": "url"}]}):
        dataset, report = select(tmp_path, rules={"min_side": 6}, **settings)
        assert {row["url"] for row in rows_of(dataset)} == ({url(1)} if settings else {url(1), url(3)})
        assert report.num_in == 3


@pytest.mark.skipif(not WILD.exists(), reason="the shared files are not beside this checkout")
def test_the_shared_files_are_read(tmp_path):
    files = find_metadata(str(WILD / "captions.tsv.example"))
    assert remarks_on(files, SelectConfig())[-1].endswith("have no aesthetic: NULL there")
    dataset, _ = select(tmp_path, metadata=str(WILD / "captions.tsv.example"), allow_private=True)
    assert {row["caption"] for row in rows_of(dataset)} == {"a cat on a chair", 'a "quoted" dog'}
    columns = {"url": "image_url", "caption": "raw_caption"}
    dataset, _ = select(tmp_path, "b", metadata=str(WILD / "rows.jsonl"), columns=columns, allow_private=True)
    assert sorted(row["caption"] for row in rows_of(dataset)) == [f"photo {i}" for i in range(4)]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_the_view_of_the_metadata_reads_text_too(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    recipe = Recipe(name="r", select=SelectConfig(metadata=str(tmp_path / name)))
    dataset = DatasetDir(tmp_path / "data")
    run_batch(SELECT, dataset, recipe, [0])
    record_recipe(dataset, recipe)
    write_views(dataset, recipe)
    with ask(dataset, "SELECT count(*) AS num, sum(width) AS width FROM metadata WHERE height = 900") as answer:
        assert answer.read_all().to_pylist() == [{"num": 41, "width": sum(row["WIDTH"] for row in ROWS)}]
