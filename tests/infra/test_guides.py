"""The pages about the code name places that exist, and their examples work."""

import ast
import os
import re
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

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


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def copy_of_the_code(folder):
    skipped = shutil.ignore_patterns("__pycache__", "*.safetensors", "*.html")
    for name in ("filters", "sdtrain"):
        shutil.copytree(ROOT / name, folder / name, ignore=skipped)
    (folder / "tests/filters").mkdir(parents=True)
    for name in ("pyproject.toml", "tests/filters/dataset_fixtures.py"):
        shutil.copy(ROOT / name, folder / name)


def runs(command, folder, text=None):
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    environment["GIT_CEILING_DIRECTORIES"] = str(folder.parent)  # else git sees a repository that holds the folder
    done = subprocess.run(command, cwd=folder, env=environment, input=text, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    "page", [f"docs/adding-a-{what}.md" for what in ("rule", "stage", "metric", "training-option")]
)
def test_the_example_of_a_page_applies_and_passes_its_test(page, tmp_path):
    [test] = blocks(page, "python")
    file = tmp_path / re.match(r"# (tests/\S+\.py)\n", test)[1]
    copy_of_the_code(tmp_path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(test)
    for diff in blocks(page, "diff"):
        code, told = runs(["git", "apply", "-C1", "-"], tmp_path, diff)
        assert code == 0, told
    code, told = runs([sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", file], tmp_path)
    assert code == 0, told
