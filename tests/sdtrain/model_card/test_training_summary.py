"""The summary of the training content: every number is the answer to the query beside it, asked again."""

import csv
import json

import duckdb
import pytest
import yaml
from typer.testing import CliRunner

from sdtrain.cli import app
from sdtrain.dataset.removal_ledger import LEDGER, write_ledger
from sdtrain.errors import UserError
from sdtrain.model_card import write_training_summary
from sdtrain.model_card.content_queries import DOMAIN
from sdtrain.model_card.training_summary import _IMAGE_RANGES, _range, summarise_dataset
from tests.sdtrain.model_card.caption_tables import write_tables
from tests.sdtrain.model_card.test_model_card import make_run

NOAI = ("robots_header", "robots_header: X-Robots-Tag: noai")
TDM = ("tdm_reserved", "tdm_reserved: tdmrep.json")
GONE = ("http_404", "http_404: Not Found")
UNSAFE, KEPT = ("max_unsafe", None), (None, None)


def rows():
    """Images of 30 domains, 30 of the first, 29 of the second, and some that were dropped."""
    kept = [
        (f"https://www{n % 3}.site{d:02d}.com/{n}.jpg", "a cat of mine", *KEPT)
        for d in range(30)
        for n in range(30 - d)
    ]
    lost = [("https://no.example.org/1.jpg", "a dog", *status) for status in (NOAI, NOAI, TDM, GONE, UNSAFE)]
    return kept + lost


@pytest.fixture
def root(tmp_path):
    """A dataset with the tables and views that a build of 500 rows leaves."""
    root = tmp_path / "data"
    dataset = write_tables(root, rows())
    recipe = {
        "name": "pretty",
        "description": "large images",
        "select": {"metadata": "hf://datasets/laion/relaion2B-en/*.parquet", "rules": {"languages": ["en"]}},
        "decide": {"rules": {"max_unsafe": 0.5}},
        "download": {"robots_txt": True, "contact": "me@example.org", "requests_per_host_s": 5},
    }
    dataset.recipe.write_text(yaml.safe_dump(recipe))
    with duckdb.connect(str(dataset.database)) as connection:
        for view in ("images", "decisions"):
            path = root / "images/*.parquet" if view == "images" else dataset.decisions
            connection.execute(f"CREATE VIEW {view} AS FROM read_parquet('{path}')")
        connection.execute(
            "CREATE TABLE funnel(stage TEXT, reason TEXT, meaning TEXT, dropped BIGINT, remaining BIGINT)"
        )
        connection.execute(
            "INSERT INTO funnel VALUES ('select', '', 'rows', 0, 600), "
            "('select', 'blocklisted', 'on a list', 130, 470), ('download', 'robots_header', 'opt-out', 2, 468), "
            "('download', 'tdm_reserved', 'opt-out', 1, 467), ('download', 'http_404', 'gone', 1, 466), "
            "('decide', 'max_unsafe', 'unsafe', 1, 465)"
        )
        connection.execute(
            "CREATE TABLE stages AS SELECT stage, 465 AS num_out, 7 AS bytes, 1.0 AS seconds, day::TIMESTAMP AS "
            "finished_at FROM (VALUES ('download', '2025-11-01'), ('download', '2025-12-24'), ('pack', '2026-01-01')) "
            "t(stage, day)"
        )
    return root


def asked_again(root, query):
    with duckdb.connect(str(root / "metadata.duckdb"), read_only=True) as connection:
        return [list(row) for row in connection.execute(query).fetchall()]


def test_every_number_is_the_answer_to_its_query(root, tmp_path):
    content = summarise_dataset("data", root, tmp_path / "domains.csv").model_dump()
    numbers = {name: part for name, part in content.items() if isinstance(part, dict) and "query" in part}
    numbers |= {f"domains.{name}": part for name, part in content["domains"].items() if "query" in str(part)}
    assert len(numbers) == 13
    for name, part in numbers.items():
        answer = asked_again(root, part["query"])
        assert answer == ([[part["value"]]] if "value" in part else part["rows"]), name
    values = {name: part["value"] for name, part in numbers.items() if "value" in part}
    assert values == {
        "num_rows": 600,
        "num_selected": 470,
        "num_fetched": 466,
        "num_kept": 465,
        "num_bytes": 7,
        "first_day": "2025-11-01",
        "last_day": "2025-12-24",
        "domains.num": 30,
        "domains.images_top": 30 + 29 + 28,
    }
    assert content["opt_outs"]["rows"] == [[NOAI[0], NOAI[1], 2], [TDM[0], TDM[1], 1]]
    assert content["lists"]["rows"] == [["blocklisted", "on a list", 130]]
    assert [row[1] for row in content["illegal"]["rows"]] == ["blocklisted", "max_unsafe"]


def test_the_ten_percent_of_domains_with_the_most_images_are_listed(root, tmp_path):
    domains = summarise_dataset("data", root, tmp_path / "domains.csv").domains
    with (tmp_path / "domains.csv").open() as file:
        found = list(csv.reader(file))
    assert found == [["domain", "images"], ["site00.com", "30"], ["site01.com", "29"], ["site02.com", "28"]]
    assert (domains.num_top, domains.num_sme) == (3, 2)
    assert domains.first.rows == [["site00.com", 30], ["site01.com", 29], ["site02.com", 28]]


def test_the_latents_are_read_instead_of_a_join_where_they_are_of_all(root, tmp_path):
    with duckdb.connect(str(root / "metadata.duckdb")) as connection:
        connection.execute("CREATE VIEW latents AS SELECT 'http://all.one/x.jpg' AS url FROM range(465)")
        connection.execute("INSERT INTO stages VALUES ('encode', 465, 7, 1.0, NULL)")
    domains = summarise_dataset("data", root, tmp_path / "domains.csv").domains
    assert domains.first.rows == [["all.one", 465]]
    with duckdb.connect(str(root / "metadata.duckdb")) as connection:
        connection.execute("UPDATE stages SET num_out = 464 WHERE stage = 'encode'")
    assert summarise_dataset("data", root, tmp_path / "domains.csv").domains.num.value == 30


def test_the_command_writes_markdown_json_and_table(root, tmp_path):
    run = make_run(tmp_path)
    ledger = [
        {"kind": "url", "listed_by": "url"},
        {"kind": "uid", "listed_by": None},
        {"kind": "host", "listed_by": "host"},
    ]
    write_ledger(root / "removed.parquet", LEDGER.empty_table().from_pylist(ledger, LEDGER))
    result = CliRunner().invoke(app, ["card", str(run), "--training-summary"])
    assert result.exit_code == 0, result.output
    assert [line.rpartition("/")[2] for line in result.output.split()] == [
        *("README.md", "training-summary.md", "training-summary.json", "training-domains-1.csv")
    ]
    text = (run / "training-summary.md").read_text()
    for part in (
        "| image | less than 1 million images | 465 |",
        "from https://huggingface.co/datasets/laion/relaion2B-en: 600 [Q",
        "`sdtrain/0.1.0 (+me@example.org)`",
        "at most 5 requests a second and 8 connections",
        "Period: 2025-11-01 [Q",
        "| site00.com | 30 |",
        "five percent and at most 1,000, is the\n  first 2 rows",
        "| robots.txt (RFC 9309) | yes |",
        "tdmrep.json) | no: download.tdm_reservation was off |",
        "| tdm_reserved | tdm_reserved: tdmrep.json | 1 |",
        "what was named (`removed.parquet`): host 1, url 1.",
        "English 100.00% (by script",
        "a rule lets in only en",
        "a Re-LAION release, from which LAION removed",
        "pretty: none; its captions are those published beside the images.",
    ):
        assert part in text, part
    assert str(tmp_path) not in text
    assert (
        text.count("```sql")
        == text.count("\nQ")
        == len({*json_queries(json.loads((run / "training-summary.json").read_text()))})
    )
    before = (run / "training-summary.md").read_bytes()
    write_training_summary(run)
    assert (run / "training-summary.md").read_bytes() == before


def json_queries(content):
    parts = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    if isinstance(content, dict) and "query" in content:
        yield content["query"]
    for part in parts:
        yield from json_queries(part)


def test_own_images_and_generated_captions_have_their_sections(root, tmp_path):
    recipe = yaml.safe_load((root / "recipe.yaml").read_text())
    recipe |= {"source": {"name": "holiday", "root": "/private"}, "select": {}}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with duckdb.connect(str(root / "metadata.duckdb")) as connection:
        connection.execute(
            "CREATE VIEW captions AS SELECT uid, unnest(['alt', 'short', 'long']) AS source FROM decisions"
        )
    write_training_summary(run := make_run(tmp_path))
    text = (run / "training-summary.md").read_text()
    assert 'images that the provider had, "holiday"' in text
    assert "None: its images were not fetched from the web." in text
    assert "| long | 465 |\n| short | 465 |" in text
    assert not list(run.glob("training-domains*"))
    assert "/private" not in text


@pytest.mark.parametrize(
    ("host", "domain"),
    [
        ("www.bbc.co.uk", "bbc.co.uk"),
        ("i.pinimg.com", "pinimg.com"),
        ("a.b.example.de", "example.de"),
        ("com.de", "com.de"),
        ("10.0.0.1", "10.0.0.1"),
        ("localhost", "localhost"),
    ],
)
def test_a_domain_is_what_is_registered(host, domain):
    assert duckdb.execute(f"SELECT {DOMAIN} FROM (SELECT $host AS host)", {"host": host}).fetchone() == (domain,)


def test_a_dataset_that_cannot_be_asked_is_named(root, tmp_path):
    (root / "metadata.duckdb").rename(tmp_path / "old.duckdb")
    with pytest.raises(UserError, match=r"no metadata\.duckdb here.*sdtrain views data"):
        summarise_dataset("data", root, tmp_path / "domains.csv")
    (tmp_path / "old.duckdb").rename(root / "metadata.duckdb")
    (root / "images").rename(root / "moved")
    with pytest.raises(UserError, match=r"If the dataset was moved, run `sdtrain views data`"):
        summarise_dataset("data", root, tmp_path / "domains.csv")


def test_views_of_an_earlier_version_have_no_times(root, tmp_path):
    with duckdb.connect(str(root / "metadata.duckdb")) as connection:
        connection.execute("ALTER TABLE stages DROP COLUMN finished_at")
    content = summarise_dataset("data", root, tmp_path / "domains.csv")
    assert (content.first_day.value, content.num_kept.value) == (None, 465)


def test_sizes_are_given_in_the_templates_ranges():
    ranges = [_range(num, _IMAGE_RANGES, "more") for num in (0, 999_999, 10**6, 10**9 - 1, 10**9)]
    assert ranges == [*["less than 1 million images"] * 2, *["1 million to 1 billion images"] * 2, "more"]
