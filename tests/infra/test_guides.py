"""The pages about adding things name places that exist, and their code works."""

import importlib
import re
from pathlib import Path

import duckdb
import pytest

from filters import rules
from filters.rules import check_rules, derived_sql

ROOT = Path(__file__).parents[2]
GUIDES = ("docs/adding-a-filter.md", "docs/adding-a-head.md", "docs/takedown.md")


def named(page):
    text = (ROOT / page).read_text()
    return re.findall(r"`((?:filters|sdtrain|tests|flows)/[\w/]+\.py)(?::(\w+))?`", text)


@pytest.mark.parametrize("page", GUIDES[:2])
def test_every_place_that_a_guide_names_is_there(page):
    places = named(page)
    assert len(places) > 3
    for file, symbol in places:
        assert (ROOT / file).exists(), file
        if symbol:
            assert hasattr(importlib.import_module(file.removesuffix(".py").replace("/", ".")), symbol), symbol


@pytest.mark.parametrize("page", GUIDES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / target).exists(), target


def test_the_rule_of_the_guide_decides(monkeypatch):
    monkeypatch.setattr(rules, "RULES", rules.RULES.copy())
    code = re.search(r"```python\n(.*?)```", (ROOT / GUIDES[0]).read_text(), re.DOTALL).group(1)
    exec(code, {})
    assert check_rules({"max_caption_words": 3}, in_keep=True) == {"max_caption_words": 3.0}
    rule = rules.RULES["max_caption_words"]
    rows = "(VALUES ('one two', 1, 1), ('a b c d', 1, 1)) AS rows(caption, width, height)"
    asked = f"SELECT {rule.sql} FROM (SELECT *, {derived_sql()} FROM {rows})"
    assert duckdb.execute(asked, [3]).fetchall() == [(True,), (False,)]
