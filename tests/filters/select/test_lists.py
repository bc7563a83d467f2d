"""Blocklists and allowlists, compared with plain Python."""

import hashlib
import json

import duckdb
import pytest

from filters.select.metadata_files import find_metadata
from filters.select.side_inputs import has_side_inputs, identify_side_inputs, load_side_inputs
from filters.select.sql_functions import host_of, host_sql, register_host_of
from filters.select_config import SelectConfig
from sdtrain.errors import UserError
from tests.filters.select.metadata_fixtures import rows_of, select
from tests.filters.select.side_input_fixtures import (
    HASHES,
    MD5S,
    NUM_ROWS,
    TEXTS,
    UIDS,
    URLS,
    apply,
    write,
    write_metadata,
)


@pytest.fixture
def metadata(tmp_path):
    return write_metadata(tmp_path / "metadata")


def reasons(metadata, **lists):
    return [row["list_reason"] for row in apply(SelectConfig(metadata=metadata, **lists))]


def blocked(metadata, files, by):
    found = reasons(metadata, blocklists=[{"files": str(files), "by": by}])
    assert set(found) <= {None, "blocklisted"}
    allowed = reasons(metadata, allowlists=[{"files": str(files), "by": by}])
    assert [reason is None for reason in allowed] == [reason is not None for reason in found]
    return [i for i, reason in enumerate(found) if reason]


LISTED = [3, 7, 12, 25]
ENTRIES = {
    "url": [URLS[i] for i in LISTED],
    "hash": [str(HASHES[i]) if i % 2 else str(HASHES[i] % 2**64) for i in LISTED],
    "uid": [UIDS[i].upper() for i in LISTED],
    "url_caption": [f"{URLS[i]}\t{TEXTS[i] or ''}" for i in LISTED],
}


@pytest.mark.parametrize("by", ENTRIES)
def test_a_text_list_drops_its_entries_and_an_allowlist_all_others(tmp_path, metadata, by):
    (tmp_path / "list.txt").write_text("# removed\n\n" + "\n".join(ENTRIES[by]) + "\n# end\n")
    assert blocked(metadata, tmp_path / "list.txt", by) == LISTED


@pytest.mark.parametrize("by", ["url", "hash", "uid"])
def test_a_comment_may_follow_an_entry(tmp_path, metadata, by):
    (tmp_path / "list.txt").write_text("".join(f"{entry} \t# asked for, 2024 #1\n" for entry in ENTRIES[by]))
    assert blocked(metadata, tmp_path / "list.txt", by) == LISTED


def test_the_fragment_of_a_url_and_the_hashtag_of_a_caption_are_no_comments(tmp_path):
    rows = [
        ("https://e.com/a#b", "t"),
        ("https://e.com/a", "t"),
        ("https://e.com/c", "sun #sea"),
        ("https://e.com/c", "sun"),
    ]
    write(tmp_path / "metadata" / "a.parquet", URL=[url for url, _ in rows], TEXT=[text for _, text in rows])
    (tmp_path / "urls.txt").write_text("https://e.com/a#b # the fragment is part of it\n")
    (tmp_path / "pairs.txt").write_text("# only here\nhttps://e.com/c\tsun #sea\n")
    for name, by, expected in (("urls", "url", rows[0]), ("pairs", "url_caption", rows[2])):
        dataset, _ = select(tmp_path, name, allowlists=[{"files": str(tmp_path / f"{name}.txt"), "by": by}])
        assert [(row["url"], row["caption"]) for row in rows_of(dataset)] == [expected]


def test_a_list_of_uids_may_mean_the_metadatas_own_as_datacomps(tmp_path):
    own = [f"{i:032x}" for i in range(4)]
    urls = [f"https://e.com/{i}" for i in range(4)]
    columns = {"url": urls, "text": ["t"] * 4}
    ours = hashlib.md5(f"{urls[3]}\nt".encode()).hexdigest()
    (tmp_path / "uids.txt").write_text(f"{own[1].upper()} # theirs\n{ours}\n")
    lists = {"allowlists": [{"files": str(tmp_path / "uids.txt"), "by": "uid"}]}
    write(tmp_path / "metadata" / "a.parquet", uid=own, **columns)
    dataset, report = select(tmp_path, **lists)
    assert {row["url"]: row["uid"] == ours for row in rows_of(dataset)} == {urls[1]: False, urls[3]: True}
    assert any("and the metadata's own column uid" in note for note in report.notes)
    rows = [{"UID": own[i], "url": urls[i], "text": "t"} for i in range(4)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    _, again = select(tmp_path, "text", metadata=str(tmp_path / "a.jsonl"), **lists)
    assert again.outputs == report.outputs
    write(tmp_path / "metadata" / "a.parquet", **columns)
    (tmp_path / "uids.txt").write_text(own[1])
    with pytest.raises(UserError, match=r"not_allowlisted 4.*sdtrain's uid \(the md5 of URL.*no column uid of its own"):
        select(tmp_path, **lists)
    _, report = select(tmp_path, blocklists=lists["allowlists"])
    assert any("alone: the metadata has no column uid of its own" in note for note in report.notes)


@pytest.mark.parametrize("by", ["url", "hash", "uid", "url_caption", "hash computed"])
def test_a_parquet_list_does_the_same(tmp_path, metadata, by):
    columns = {
        "url": {"url": ENTRIES["url"]},
        "hash": {"hash": [HASHES[i] for i in LISTED]},
        "uid": {"UID": [UIDS[i] for i in LISTED]},
        "url_caption": {"URL": [URLS[i] for i in LISTED], "TEXT": [TEXTS[i] for i in LISTED]},
    }
    columns["hash computed"] = columns["url_caption"]
    write(tmp_path / "list" / "a.parquet", **{name: values[:2] for name, values in columns[by].items()})
    write(tmp_path / "list" / "b.parquet", **{name: values[1:] for name, values in columns[by].items()})
    assert blocked(metadata, tmp_path / "list", by.split()[0]) == LISTED


def test_a_host_means_its_subdomains_in_any_spelling(tmp_path, metadata):
    lines = ["HOST1.example", "*.host2.example", "https://img.img.host3.example/x", "host", "examp.le"]
    (tmp_path / "hosts.txt").write_text("\n".join(lines))
    ends = ("host1.example", "host2.example", "img.img.host3.example")
    listed = [i for i, url in enumerate(URLS) if host_of(url).endswith(ends)]
    assert blocked(metadata, tmp_path / "hosts.txt", "host") == listed
    write(tmp_path / "hosts.parquet", Domain=["host1.EXAMPLE", ".host2.example", "img.img.host3.example"])
    assert blocked(metadata, tmp_path / "hosts.parquet", "host") == listed


def test_hosts_are_read_alike_by_sql_and_python():
    urls = {
        "https://A.example.com/x": "a.example.com", "http://a.example.:8080/": "a.example", "HTTP://a.b?x": "a.b",
        "http://u:p@a.example/": "a.example", "http://müller.example/ä": "xn--mller-kva.example",
        "ftp://a.example": "a.example",
        "http://[::1]:80/": "::1", "no url": "", "http://[": "", "https://a.example#@b.example/": "a.example",
        "http://a.example\\@b.example/": "b.example", "http://1.2.3.4/": "1.2.3.4", " http://a.example": "a.example",
    }  # fmt: skip
    assert {url: host_of(url) for url in urls} == urls
    with duckdb.connect() as connection:
        register_host_of(connection)
        rows = connection.execute(f"SELECT u, {host_sql('u')} FROM (SELECT unnest(?) AS u)", [list(urls)]).fetchall()
    assert dict(rows) == urls


def test_md5_lists_need_md5s_which_a_join_can_bring(tmp_path, metadata):
    (tmp_path / "list.txt").write_text("\n".join(MD5S[i] for i in LISTED))
    lists = [{"files": str(tmp_path / "list.txt"), "by": "md5"}]
    with pytest.raises(
        UserError, match=r"is keyed by md5, which the metadata does not have\. Bring it with `select.joins`"
    ):
        reasons(metadata, blocklists=lists)
    files = write(tmp_path / "md5.parquet", URL=URLS, TEXT=TEXTS, md5=MD5S)
    found = reasons(metadata, blocklists=lists, joins=[{"files": files, "by": "url_caption"}])
    assert [i for i, reason in enumerate(found) if reason] == LISTED


def test_a_row_must_be_on_every_allowlist_and_on_no_blocklist(tmp_path, metadata):
    for name, rows in (("first", range(10)), ("second", range(5, 20)), ("third", range(8, 12))):
        (tmp_path / f"{name}.txt").write_text("\n".join(UIDS[i] for i in rows))
    first, second, third = ({"files": str(tmp_path / f"{n}.txt"), "by": "uid"} for n in ("first", "second", "third"))
    found = reasons(metadata, allowlists=[first, second], blocklists=[third])
    assert [i for i, reason in enumerate(found) if reason is None] == [5, 6, 7]
    assert [i for i, reason in enumerate(found) if reason == "blocklisted"] == [8, 9, 10, 11]


@pytest.mark.parametrize(
    ("by", "line", "words"),
    [
        ("hash", "12x", "list.txt, line 3: '12x' is not a whole number of 64 bits"),
        ("hash", str(2**64), "line 3: .* is not a whole number of 64 bits"),
        ("host", "a b", "line 3: 'a b' is not a host's name"),
        ("uid", "abc", "line 3: 'abc' is not a uid"),
        ("sha256", "f" * 63, "is not a sha256"),
        ("url", "e.com", "line 3: 'e.com' is not a URL with scheme"),
        ("url_caption", "https://e.com", "is not a URL, a tab and a caption"),
    ],
)
def test_what_is_no_entry_is_named_by_file_and_line(tmp_path, metadata, by, line, words):
    (tmp_path / "list.txt").write_text(f"# comment\n\n{line}\n")
    joins = [{"files": write(tmp_path / "s.parquet", hash=HASHES, sha256=["0" * 64] * NUM_ROWS)}]
    with pytest.raises(UserError, match=words):
        reasons(metadata, blocklists=[{"files": str(tmp_path / "list.txt"), "by": by}], joins=joins)


def test_unreadable_lists_are_sentences(tmp_path, metadata):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9.example\n")
    (tmp_path / "no.parquet").write_text("text")
    write(tmp_path / "other.parquet", URL=URLS)
    for name, by, words in [
        ("latin.txt", "host", "latin.txt is not UTF-8 text"),
        ("no.parquet", "url", "no.parquet cannot be read as Parquet"),
        ("other.parquet", "host", "other.parquet is no list by host: it has no column host and domain"),
        ("other.parquet", "url_caption", "it has no column caption and url"),
        ("gone.txt", "url", "no file or folder .*gone.txt, which the recipe names as a blocklist or allowlist"),
    ]:
        with pytest.raises(UserError, match=words):
            reasons(metadata, blocklists=[{"files": str(tmp_path / name), "by": by}])


def test_empty_lists_block_nothing_and_allow_nothing(tmp_path, metadata):
    (tmp_path / "none.txt").write_text("# nothing yet\n")
    for by in ("host", "hash", "url"):
        assert blocked(metadata, tmp_path / "none.txt", by) == []


def test_without_joins_and_lists_nothing_is_added(metadata):
    select = SelectConfig(metadata=metadata)
    assert not has_side_inputs(select)
    assert apply(select, "remarks") == []
    with duckdb.connect() as connection:
        assert load_side_inputs(connection, select, find_metadata(metadata)).joins.sql("SELECT 1") == "SELECT 1"
    assert reasons(metadata) == [None] * NUM_ROWS


def test_the_fingerprint_follows_the_contents_of_lists_and_scores(tmp_path, metadata):
    (tmp_path / "list.txt").write_text(UIDS[0])
    scores = write(tmp_path / "s.parquet", hash=HASHES, punsafe=[0.1] * NUM_ROWS)
    select = SelectConfig(
        metadata=metadata, joins=[{"files": scores}], blocklists=[{"files": str(tmp_path / "list.txt"), "by": "uid"}]
    )
    before = identify_side_inputs(select)
    assert identify_side_inputs(select) == before
    (tmp_path / "list.txt").write_text(UIDS[1])
    assert identify_side_inputs(select) != before
