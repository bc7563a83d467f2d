"""What the README shows is what the project has."""

from __future__ import annotations

import re
from pathlib import Path

from filters.inspect.query import QUESTIONS
from filters.recipe import known_recipes
from sdtrain.config import known_configs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
QUERYING = (ROOT / "docs" / "querying.md").read_text()


def test_the_page_shows_ten_questions_that_are_tested_elsewhere():
    assert len(QUESTIONS) == 10
    for question in QUESTIONS:
        assert f"-- {question.title}\n{question.sql};" in QUERYING


def test_it_asks_some_of_them():
    [shown] = re.findall(r"```sql\n(.*?)```", README, re.DOTALL)
    assert all(any(f"-- {known.title}\n{known.sql}" == one for known in QUESTIONS) for one in shown.split(";\n") if one)


def test_every_recipe_and_config_is_named():
    for name in known_recipes():
        assert f"`{name}`" in README
        assert f"`{name}`" in (ROOT / "docs" / "building.md").read_text()
    for name in known_configs():
        assert f"`{name}`" in (ROOT / "docs" / "training.md").read_text()


def test_it_is_short_and_has_one_image():
    assert len(README.splitlines()) <= 125
    assert README.count("![") == 1


def test_it_has_the_commands_that_users_know():
    for command in ("prefect deployment run build-laion-aesthetics", "deepspeed sdtrain/train.py", "duckdb -readonly"):
        assert f"$ {command}" in README


def test_it_opens_with_the_two_commands():
    first_block = re.search(r"```console\n(.*?)```", README, re.DOTALL)
    assert first_block
    assert [line.split("#")[0].strip() for line in first_block.group(1).splitlines()] == ["$ make demo", "$ make test"]
