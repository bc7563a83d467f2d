"""Every release of LAION, COYO and DataComp read into one schema, with what is odd in each said aloud."""

import json
import shutil
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from filters.columns import ALIASES, TYPES
from filters.select.metadata_files import find_metadata, remarks_on
from filters.select.pushdown import Pushdown
from filters.select.schema import check_columns, normalised_sql
from filters.select_config import SelectConfig
from sdtrain.errors import UserError

NAN = float("nan")
F32, F64, I32, I64, TEXT = pa.float32(), pa.float64(), pa.int32(), pa.int64(), pa.string()
URL_TEXT = {"URL": (TEXT, "https://e.com/a.jpg"), "TEXT": (TEXT, "a cat")}
TAGS = {"similarity": (F64, 0.3), "hash": (I64, -5), "punsafe": (F32, 0.25), "pwatermark": (F32, 0.5)}
SIZES = {"WIDTH": (I32, 600), "HEIGHT": (I32, 400)}
RAW = {
    "SAMPLE_ID": (I64, 1), **URL_TEXT, "HEIGHT": (I32, 600), "WIDTH": (I32, 400), "LICENSE": (TEXT, "?"),
    "NSFW": (TEXT, "UNLIKELY"), "similarity": (F64, 0.3),
}  # fmt: skip
READ = {"url": "https://e.com/a.jpg", "caption": "a cat", "width": 600, "height": 400, "similarity": 0.3}
TAGS_READ = READ | {"hash": -5, "punsafe": 0.25, "pwatermark": 0.5}
DIGESTS = {
    "md5": "D41D8CD98F00B204E9800998ECF8427E",
    "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
}

# Release -> its columns (type, value) and what they are read as.
RELEASES = {
    "laion400m": (RAW, READ | {"nsfw": "UNLIKELY"}),
    "laion2B-en": (RAW, READ | {"nsfw": "UNLIKELY"}),
    "laion2B-en-joined": (URL_TEXT | SIZES | TAGS, TAGS_READ),
    "laion2B-multi-joined": (URL_TEXT | SIZES | {"LANGUAGE": (TEXT, "de")} | TAGS, TAGS_READ | {"language": "de"}),
    "laion2B-en-aesthetic": (URL_TEXT | SIZES | TAGS | {"aesthetic": (F32, 7.5)}, TAGS_READ | {"aesthetic_v1": 7.5}),
    "laion-high-resolution": (URL_TEXT | SIZES | TAGS | {"LANGUAGE": (TEXT, "en")}, TAGS_READ | {"language": "en"}),
    "improved_aesthetics_6.5plus": (
        URL_TEXT | TAGS | {
            "WIDTH": (F64, 600.0), "HEIGHT": (F64, 400.0), "AESTHETIC_SCORE": (F32, 6.75),
            "__index_level_0__": (I64, 7),
        },
        TAGS_READ | {"aesthetic": 6.75},
    ),
    "aesthetics_v2_4.75": (
        URL_TEXT | {
            **{name: (F64, value) for name, (_, value) in (SIZES | TAGS).items()}, "hash": (I64, -5),
            "AESTHETIC_SCORE": (F64, 4.875), "__index_level_0__": (I64, 7),
        },
        TAGS_READ | {"aesthetic": 4.875},
    ),
    "relaion2B-en": (
        {"url": URL_TEXT["URL"], "caption": URL_TEXT["TEXT"], "width": (I64, 600), "height": (I64, 400), **TAGS},
        TAGS_READ,
    ),
    "coyo-700m": (
        {
            "id": (I64, 1), "url": URL_TEXT["URL"], "text": URL_TEXT["TEXT"], **SIZES, "image_phash": (TEXT, "ff"),
            "clip_similarity_vitb32": (F64, 0.3), "clip_similarity_vitl14": (F64, 0.2), "watermark_score": (F32, 0.5),
            "aesthetic_score_laion_v2": (F32, 5.25),
        },
        READ | {"pwatermark": 0.5, "aesthetic": 5.25},
    ),
    "datacomp": (
        {
            "uid": (TEXT, "00"), "url": URL_TEXT["URL"], "text": URL_TEXT["TEXT"], "original_width": (I64, 600),
            "original_height": (I64, 400), "clip_b32_similarity_score": (F32, 0.25),
            "clip_l14_similarity_score": (F32, 0.2),
            "face_bboxes": (pa.list_(pa.list_(F64)), [[0.1]]), "sha256": (TEXT, DIGESTS["sha256"]),
        },
        READ | {"similarity": 0.25, "sha256": DIGESTS["sha256"]},
    ),
    "img2dataset output": (
        RAW | {
            "width": (I32, 256), "original_width": (I32, 600), "original_height": (I32, 400),
            "md5": (TEXT, DIGESTS["md5"]),
        },
        READ | {"nsfw": "UNLIKELY", "md5": DIGESTS["md5"].lower()},
    ),
}  # fmt: skip
RELEASES["img2dataset output"][0].pop("WIDTH")


def write(path, columns, num_rows=1):
    arrays = {name: pa.array([value] * num_rows, kind) for name, (kind, value) in columns.items()}
    pq.write_table(pa.table(arrays), path)


def read(files, **options):
    sql, values = normalised_sql(files, **options)
    with duckdb.connect() as connection:
        return connection.execute(sql, values).to_arrow_table()


@pytest.mark.parametrize("release", RELEASES)
def test_each_release_is_read_into_one_schema(tmp_path, release):
    columns, expected = RELEASES[release]
    write(tmp_path / "a.parquet", columns)
    files = find_metadata(str(tmp_path))
    sql, values = normalised_sql(files)
    described = duckdb.execute(f"DESCRIBE {sql}", values).fetchall()
    assert {name: kind for name, kind, *_ in described} == TYPES
    assert list(TYPES) == list(ALIASES) == [name for name, *_ in described]
    assert read(files).to_pylist() == [dict.fromkeys(ALIASES) | expected]


def test_all_releases_together_are_one_table(tmp_path):
    for name, (columns, _) in RELEASES.items():
        write(tmp_path / f"{name}.parquet", columns)
    found = read(find_metadata(str(tmp_path))).to_pylist()
    expected = [dict.fromkeys(ALIASES) | row for _, row in RELEASES.values()]
    assert sorted(map(json.dumps, found)) == sorted(map(json.dumps, expected))


def test_files_with_the_same_columns_in_another_order_and_with_more_are_read_together(tmp_path):
    write(tmp_path / "a.parquet", URL_TEXT | SIZES | {"extra": (I32, 1)})
    write(tmp_path / "b.parquet", dict(reversed((URL_TEXT | SIZES).items())))
    files = find_metadata(str(tmp_path))
    assert normalised_sql(files)[0].count("UNION ALL") == 0 or len(files) == 2
    assert read(files).to_pylist() == [dict.fromkeys(ALIASES) | {**READ, "similarity": None}] * 2


def test_sizes_and_scores_that_are_no_numbers_are_null(tmp_path):
    table = {
        "URL": ["a"] * 4, "TEXT": ["t"] * 4, "WIDTH": [NAN, 511.9, 1e30, -3.0], "HEIGHT": ["12", "x", "", None],
        "AESTHETIC_SCORE": pa.array([NAN, float("inf"), 5.0, None], F32), "punsafe": ["0.5", "nan", "", None],
        "md5": ["d41d8cd9", "", "xyz", None], "hash": [2.0**70, 1.0, NAN, None],
    }  # fmt: skip
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    found = read(find_metadata(str(tmp_path)))
    assert found["width"].to_pylist() == [None, 511, None, -3]
    assert found["height"].to_pylist() == [12, None, None, None]
    assert found["aesthetic"].to_pylist() == [None, None, 5.0, None]
    assert found["punsafe"].to_pylist() == [0.5, None, None, None]
    assert found["md5"].to_pylist() == [None] * 4
    assert found["hash"].to_pylist() == [None, 1, None, None]


def test_binary_text_is_decoded_where_it_can_be(tmp_path):
    pq.write_table(
        pa.table({"URL": [b"https://e.com/\xc3\xa4", b"\xff"], "TEXT": [b"t", b"t"]}), tmp_path / "a.parquet"
    )
    assert read(find_metadata(str(tmp_path)))["url"].to_pylist() == ["https://e.com/ä", None]


@pytest.mark.parametrize(("setting", "width"), [("auto", 600), ("yes", 600), ("no", 400)])
def test_swapped_sizes_are_turned_back_in_raw_releases_unless_told_otherwise(tmp_path, setting, width):
    write(tmp_path / "raw.parquet", RAW)
    (file,) = find_metadata(str(tmp_path), setting)
    assert read([file])["width"].to_pylist() == [width]
    assert file.swapped == (setting != "no")


def test_swapped_sizes_are_turned_where_only_the_user_knows(tmp_path):
    write(tmp_path / "a.parquet", URL_TEXT | SIZES)
    write(tmp_path / "b.parquet", URL_TEXT | {"WIDTH": (I32, 400), "HEIGHT": (F64, 600.0)})
    assert read(find_metadata(str(tmp_path / "a.parquet"), "yes"))["width"].to_pylist() == [400]
    assert read(find_metadata(str(tmp_path / "b.parquet"), "yes"))["width"].to_pylist() == [600]


def test_what_is_handled_on_purpose_is_said(tmp_path):
    for name in ("laion2B-en", "laion2B-en-aesthetic", "aesthetics_v2_4.75", "coyo-700m"):
        write(tmp_path / f"{name}.parquet", RELEASES[name][0])
    select = SelectConfig(rules={"min_aesthetic": 5, "max_watermark": 0.5, "min_side": 1}, null_policy="score_later")
    assert remarks_on(find_metadata(str(tmp_path)), select) == [
        "1 of 4 files have WIDTH and HEIGHT swapped (raw LAION release); turned back",
        "column aesthetic of 1 of 4 files holds V1 scores; used only by min_aesthetic_v1",
        "similarity is read from clip_similarity_vitb32 in 1 of 4 files",
        "pwatermark is read from watermark_score in 1 of 4 files",
        "aesthetic is read from aesthetic_score_laion_v2 in 1 of 4 files",
        "sizes in 1 of 4 files are fractions; cut to whole pixels, NaN is NULL",
        "__index_level_0__ of 1 of 4 files ignored",
        "1 of 4 files have no pwatermark: NULL there",
        "2 of 4 files have no punsafe: NULL there",
        "2 of 4 files have no aesthetic: NULL there",
        "rows with NULL or NaN in pwatermark, aesthetic stay until the image is scored (null_policy: score_later)",
    ]
    write(tmp_path / "only.parquet", URL_TEXT | SIZES | TAGS | {"AESTHETIC_SCORE": (F32, 5.0)})
    assert remarks_on(find_metadata(str(tmp_path / "only.parquet")), SelectConfig(rules={"min_side": 1})) == []


def test_scores_of_the_first_predictor_are_not_taken_for_the_second(tmp_path):
    write(tmp_path / "a.parquet", RELEASES["laion2B-en-aesthetic"][0])
    files = find_metadata(str(tmp_path))
    with pytest.raises(UserError, match=r"first predictor.*never mixed.*'min_aesthetic_v1'"):
        check_columns(files, ["min_aesthetic"])
    check_columns(files, ["min_aesthetic_v1"])
    check_columns(files, ["min_aesthetic"], missing_passes=["aesthetic"])
    with pytest.raises(UserError, match="has no column LANGUAGE, which rule 'languages' needs"):
        check_columns(files, ["languages"])


def test_a_selection_of_ours_can_be_metadata_again(tmp_path):
    write(
        tmp_path / "a.parquet",
        {"url": URL_TEXT["URL"], "caption": (TEXT, "c"), "aesthetic": (F64, 6.0), "aesthetic_v1": (F64, 8.0)},
    )
    (row,) = read(find_metadata(str(tmp_path))).to_pylist()
    assert (row["aesthetic"], row["aesthetic_v1"]) == (6.0, 8.0)


def test_a_file_is_the_same_wherever_it_lies_and_another_when_its_content_is(tmp_path):
    write(tmp_path / "a.parquet", RAW)
    (tmp_path / "b").mkdir()
    moved = shutil.copy(tmp_path / "a.parquet", tmp_path / "b" / "a.parquet")
    before = find_metadata(str(tmp_path / "a.parquet"))[0].identity
    assert find_metadata(str(moved))[0].identity == before
    write(tmp_path / "a.parquet", RAW | {"similarity": (F64, 0.4)})
    assert find_metadata(str(tmp_path / "a.parquet"))[0].identity != before


def test_columns_that_differ_in_case_only_are_refused(tmp_path):
    write(tmp_path / "a.parquet", URL_TEXT | {"url": (TEXT, "x")})
    with pytest.raises(UserError, match="two columns that differ in case only: URL and url"):
        find_metadata(str(tmp_path))


# --- What is not needed is not read -----------------------------------------------------------------------------------

NUM_ROWS, PER_GROUP = 40_000, 2_000


@pytest.fixture(scope="module")
def sorted_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("sorted") / "a.parquet"
    numbers = np.arange(NUM_ROWS)
    table = {
        "URL": [f"https://example.com/{i:040d}.jpg" for i in numbers], "TEXT": [f"caption {i:060d}" for i in numbers],
        "WIDTH": numbers.astype(np.int32), "HEIGHT": numbers.astype(np.int32) + 5,
        "AESTHETIC_SCORE": np.linspace(0, 10, NUM_ROWS, dtype=np.float32), "pwatermark": np.linspace(0, 1, NUM_ROWS),
    }  # fmt: skip
    pq.write_table(pa.table(table), path, row_group_size=PER_GROUP, compression="none", use_dictionary=False)
    return path


def scan(path, select, pushdown=None):
    """What reading comes to: (rows that the scan gives, columns and filters in it, bytes read from the disk)."""
    sql, values = normalised_sql(find_metadata(str(path)), pushdown)
    with duckdb.connect() as connection:
        connection.execute("SET threads = 1")
        connection.execute("SET enable_external_file_cache = false")
        before = bytes_read()
        explained = connection.execute(
            f"EXPLAIN (ANALYZE, FORMAT json) SELECT {select} FROM ({sql})", values
        ).fetchall()
        num_bytes = bytes_read() - before
    node = json.loads(explained[0][1])
    while node["children"]:
        node = node["children"][0]
    info = node["extra_info"]
    return node["operator_cardinality"], info["Projections"], info.get("Filters", []), num_bytes


def bytes_read():
    """What this process has asked the system to read, so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.parametrize(
    ("rules", "share", "bound"),
    [
        ({"min_side": 38_000.0}, 0.05, "WIDTH>=38000"),
        ({"min_aesthetic": 9.5}, 0.05, "AESTHETIC_SCORE>="),
        ({"max_watermark": 0.05}, 0.05, "pwatermark<="),
        ({"min_side": 10_000.0, "max_watermark": 0.3}, 0.05, "HEIGHT>="),
    ],
)
def test_bounds_reach_the_parquet_scan_and_skip_row_groups(sorted_file, rules, share, bound):
    whole = scan(sorted_file, "max(url)")
    rows, _, filters, num_bytes = scan(sorted_file, "max(url)", Pushdown(rules))
    assert rows == pytest.approx(share * NUM_ROWS, rel=0.02)
    assert bound in str(filters)
    assert num_bytes < (share + 0.1) * whole[3]


def test_where_missing_scores_pass_strings_are_read_for_survivors_only(sorted_file):
    whole = scan(sorted_file, "max(url)")
    rows, _, _, num_bytes = scan(sorted_file, "max(url)", Pushdown({"min_aesthetic": 9.5}, ["aesthetic"]))
    assert rows == pytest.approx(0.05 * NUM_ROWS, rel=0.02)
    assert num_bytes < 0.3 * whole[3]


def test_columns_that_nobody_asks_for_are_not_read(sorted_file):
    _, columns, _, num_bytes = scan(sorted_file, "sum(width)")
    assert columns == "WIDTH"
    assert num_bytes < 0.1 * scan(sorted_file, "max(caption)")[3]


def test_numbers_whose_type_is_ours_are_passed_through_as_they_are(sorted_file):
    assert '"WIDTH" AS width' in normalised_sql(find_metadata(str(sorted_file)))[0]
