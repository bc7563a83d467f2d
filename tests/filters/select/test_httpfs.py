"""Metadata on web servers and object stores, read by DuckDB's httpfs from a server on loopback."""

import gzip

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from filters.select.httpfs import is_remote, load_remote, without_secrets
from filters.select.metadata_files import find_metadata, prepare
from filters.select.pushdown import Pushdown
from filters.select.schema import normalised_sql
from filters.select.side_inputs import identify_side_inputs
from filters.select_config import SelectConfig
from sdtrain.errors import UserError
from tests.filters.store_fixtures import needs_httpfs, serving
from tests.sdtrain.download.http.proxy_server import ProxyServer

NUM_ROWS = 20_000


@pytest.fixture
def store(monkeypatch):
    """A running server, with credentials for it in this process's environment."""
    with serving() as handler:
        for name in ("AWS_SESSION_TOKEN", "AWS_REGION", "HF_TOKEN", "GCS_ACCESS_KEY_ID", "AWS_ENDPOINT_URL_S3"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_ENDPOINT_URL", handler.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "the-key-id")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-secret-key")
        yield handler


def parquet(begin=0):
    numbers = range(begin, begin + NUM_ROWS)
    columns = {
        "URL": [f"https://e.com/{i:040d}.jpg" for i in numbers], "TEXT": [f"caption {i:080d}" for i in numbers],
        "WIDTH": pa.array(numbers, pa.int32()), "HEIGHT": pa.array(numbers, pa.int32()),
    }  # fmt: skip
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, row_group_size=1000, compression="none", use_dictionary=False)
    return sink.getvalue().to_pybytes()


def read(files, select, pushdown=None):
    sql, values = normalised_sql(files, pushdown)
    with duckdb.connect() as connection:
        prepare(connection, [file.path for file in files])
        return connection.execute(f"SELECT {select} FROM ({sql})", values).fetchall()


@needs_httpfs
@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_metadata_are_read_through_a_proxy_with_a_login(store, variable, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    store.files["data/a.parquet"] = parquet()
    with ProxyServer(login="user:it's@home").running() as proxy:
        monkeypatch.setenv(variable, f"http://user:it's%40home@127.0.0.1:{proxy.port}/")
        assert find_metadata(f"{store.url}/data/a.parquet")[0].num_rows == NUM_ROWS
        assert proxy.asked[0].endswith(f" {store.url}/data/a.parquet")
        num_asked = len(proxy.asked)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        assert find_metadata(f"{store.url}/data/a.parquet")[0].num_rows == NUM_ROWS
        assert len(proxy.asked) == num_asked


@needs_httpfs
def test_a_file_on_a_web_server_is_read_by_ranges_and_only_where_needed(store):
    content = store.files["data/a.parquet"] = parquet()
    files = find_metadata(f"{store.url}/data/a.parquet?signature=s3cr3t")
    assert (files[0].num_rows, files[0].identity[:2]) == (NUM_ROWS, ("a.parquet", len(content)))
    store.sent.clear()
    assert read(files, "count(url), min(width)", Pushdown({"min_side": NUM_ROWS - 1000})) == [(1000, NUM_ROWS - 1000)]
    assert 0 < store.sent["data/a.parquet"] < 0.25 * len(content)


@needs_httpfs
@pytest.mark.parametrize(
    "pattern",
    ["s3://bucket/laion/", "s3://bucket/laion", "s3://bucket/laion/*.parquet", "s3://bucket/**/part-*.parquet"],
)
def test_folders_and_globs_of_an_object_store_are_found_in_order(store, pattern):
    for number in (1, 0):
        store.files[f"bucket/laion/part-{number}.parquet"] = parquet(number * NUM_ROWS)
    store.files["bucket/laion/README.md"] = store.files["bucket/other.parquet"] = b"no Parquet"
    files = find_metadata(pattern)
    assert [file.path for file in files] == [f"s3://bucket/laion/part-{number}.parquet" for number in range(2)]
    assert read(files, "count(*), max(width)") == [(2 * NUM_ROWS, 2 * NUM_ROWS - 1)]
    assert files[0].identity != files[1].identity
    assert find_metadata(pattern)[0].identity == files[0].identity
    assert all("Credential=the-key-id/" in authorization for _, authorization in store.seen)


@needs_httpfs
@pytest.mark.parametrize("pattern", ["{url}/rows/b.csv.gz?signature=s3cr3t", "s3://rows", "s3://rows/*.gz"])
def test_text_may_be_remote_too_and_is_known_by_name_size_and_time(store, pattern):
    store.files["rows/b.csv.gz"] = gzip.compress(b"url;caption;width\nhttps://e.com/1;a;7\nhttps://e.com/2;;8\n")
    (file,) = find_metadata(pattern.format(url=store.url))
    assert read([file], "url, caption, width") == [("https://e.com/1", "a", 7), ("https://e.com/2", None, 8)]
    assert file.identity[:2] == ("b.csv.gz", len(store.files["rows/b.csv.gz"]))
    assert find_metadata(pattern.format(url=store.url))[0].identity == file.identity


@needs_httpfs
def test_lists_and_score_files_may_be_remote_too(store):
    store.files["bucket/hosts.txt"] = b"# none\nexample.com\n"
    select = SelectConfig(blocklists=[{"files": "s3://bucket/hosts.txt", "by": "host"}])
    before = identify_side_inputs(select)
    store.files["bucket/hosts.txt"] = b"example.org\n"
    assert identify_side_inputs(select) != before


@needs_httpfs
@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("{url}/data/none.parquet?sig=s3cr3t", "none.parquet cannot be read as Parquet"),
        ("{url}/data/text.parquet", "text.parquet cannot be read as Parquet"),
        ("{url}/data/*.parquet", "must be one file: web servers cannot be asked for a list"),
        ("s3://bucket/nothing/", "or .ndjson file in the folder s3://bucket/nothing/"),
        ("s3://bucket/none-*.parquet", "no file or folder s3://bucket/none"),
        ("s3://bucket/none.parquet", "none.parquet cannot be read as Parquet"),
    ],
)
def test_mistakes_are_sentences_without_credentials(store, pattern, words):
    store.files["data/text.parquet"] = b"no Parquet at all, and long enough to have a footer"
    with pytest.raises(UserError, match=words) as raised:
        find_metadata(pattern.format(url=store.url))
    assert not [secret for secret in ("s3cr3t", "the-secret-key") if secret in str(raised.value)]


@needs_httpfs
def test_credentials_are_not_shown_by_the_connection(store):
    with duckdb.connect() as connection:
        load_remote(connection)
        load_remote(connection)
        (secret,) = connection.execute("SELECT secret_string FROM duckdb_secrets()").fetchall()
    assert "the-secret-key" not in secret[0]


def test_without_the_extension_a_sentence_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setattr("filters.select.httpfs.importlib.util.find_spec", lambda name: None)
    with duckdb.connect() as connection:
        connection.execute("SET extension_directory = ?", [str(tmp_path)])
        with pytest.raises(
            UserError, match=r"httpfs, which is not installed. Install it: pip install 'sdtrain\[remote\]'"
        ):
            load_remote(connection)


def test_an_extension_for_another_duckdb_is_named(monkeypatch, tmp_path):
    (tmp_path / "wheel" / "extensions" / "v1.0.0").mkdir(parents=True)
    monkeypatch.setattr("filters.select.httpfs._wheel", lambda: tmp_path / "wheel")
    with duckdb.connect() as connection:
        connection.execute("SET extension_directory = ?", [str(tmp_path)])
        with pytest.raises(UserError, match=r"installed for DuckDB v1\.0\.0 only, and this is v"):
            load_remote(connection)


def test_urls_are_told_from_paths_and_shown_without_secrets():
    assert [is_remote(path) for path in ("s3://b/x", "hf://datasets/a/b", "/tmp/x", "x:y.parquet")] == [1, 1, 0, 0]
    with pytest.raises(UserError, match=r"ftp://e.com/x cannot be read: use a local path or s3://"):
        is_remote("ftp://me:pw@e.com/x?y")
    assert without_secrets("https://me:pw@e.com:8/x/*.parquet?sig=1#f") == "https://e.com:8/x/*.parquet"
