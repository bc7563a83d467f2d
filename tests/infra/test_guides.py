"""The pages about the code name places that exist, and their examples work."""

import ast
import re
from functools import lru_cache
from pathlib import Path

import duckdb
import pytest

from filters import rules
from filters.rules import check_rules, derived_sql

ROOT = Path(__file__).parents[2]
PAGES = ["CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md") if path.stem != "LOG")]
TOUR = "docs/tour.md"
MOST_LINES = 2000


def named(page):
    """The places between backticks: `file.py:name`, `file.py:Class.name`, `file.py`."""
    text = (ROOT / page).read_text()
    return re.findall(r"`((?:filters|sdtrain|tests|flows|infra)/[\w/]+\.py)(?::([\w.]+))?`", text)


@lru_cache
def definitions(file):
    """Names of a file's functions, classes, methods and constants, with their first and last lines."""
    found = {}

    def collect(body, prefix):
        for node in body:
            names = [node.name] if hasattr(node, "name") else []
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [target.id for target in targets if isinstance(target, ast.Name)]
            for name in names:
                found[prefix + name] = (node.lineno, node.end_lineno)
            if isinstance(node, ast.ClassDef):
                collect(node.body, f"{node.name}.")

    collect(ast.parse((ROOT / file).read_text()).body, "")
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_place_that_a_page_names_is_there(page):
    for file, symbol in named(page):
        assert (ROOT / file).exists(), file
        assert not symbol or symbol in definitions(file), f"{file} has no {symbol}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / target).exists(), target


def test_the_tour_is_short_and_goes_from_metadata_to_a_sampled_image():
    stops = [(file, symbol) for file, symbol in named(TOUR) if symbol and not file.startswith("tests/")]
    lines = {(file, line) for file, name in stops for line in range(*definitions(file)[name])}
    assert len(stops) >= 40
    assert len(lines) <= MOST_LINES
    order = [file.rsplit("/", 1)[0] for file, _ in stops]
    folders = [
        "filters/select", "sdtrain/download", "filters/score", "filters/dedup", "filters/decide", "sdtrain/pack",
        "sdtrain/encode", "sdtrain/loading", "sdtrain/training", "sdtrain/sampling",
    ]  # fmt: skip
    first = [order.index(folder) for folder in folders]
    assert first == sorted(first)


def examples(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_the_rule_of_its_page_decides(monkeypatch):
    monkeypatch.setattr(rules, "RULES", rules.RULES.copy())
    exec(examples("docs/adding-a-rule.md")[0], {})
    assert check_rules({"max_caption_words": 3}, in_keep=True) == {"max_caption_words": 3.0}
    rule = rules.RULES["max_caption_words"]
    rows = "(VALUES ('one two', 1, 1), ('a b c d', 1, 1)) AS rows(caption, width, height)"
    asked = f"SELECT {rule.sql} FROM (SELECT *, {derived_sql()} FROM {rows})"
    assert duckdb.execute(asked, [3]).fetchall() == [(True,), (False,)]
