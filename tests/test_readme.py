"""What the README shows is what the project has."""

from __future__ import annotations

import re
from pathlib import Path

from filters.inspect.query import QUESTIONS
from filters.recipe import known_recipes
from sdtrain.config import known_configs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_it_shows_ten_questions_that_are_tested_elsewhere():
    assert len(QUESTIONS) == 10
    for question in QUESTIONS:
        assert f"-- {question.title}\n{question.sql};" in README


def test_it_names_every_recipe_and_config():
    for name in (*known_recipes(), *known_configs()):
        assert f"`{name}`" in README


def test_its_images_and_links_exist():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_it_opens_with_the_two_commands():
    first_block = re.search(r"```console\n(.*?)```", README, re.DOTALL)
    assert first_block
    assert [line.split("#")[0].strip() for line in first_block.group(1).splitlines()] == ["$ make demo", "$ make test"]
