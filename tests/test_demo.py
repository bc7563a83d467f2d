"""The demo as a newcomer runs it: samples follow their prompts, and a second run does nothing again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import duckdb
import pytest

from filters.pipeline import stages_of
from filters.recipe import load_recipe

pytestmark = [pytest.mark.slow, pytest.mark.first, pytest.mark.timeout(1200)]

MADE_ANEW = ("index.json", "console.log", "results.json", "results.csv", "curve.png", "README.md", "datasets.json")
MADE_ANEW += ("demo-prompts.txt", "prompts.json", "protocol.json")


def run_demo(output: Path) -> tuple[dict, str]:
    """The figures that the demo prints last, and all it printed."""
    command = [sys.executable, "-m", "flows.demo", "--output", str(output)]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # a newcomer's
    ended = subprocess.run(
        command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    assert ended.returncode == 0, ended.stdout[-5000:]
    return json.loads(ended.stdout.strip().splitlines()[-1]), ended.stdout


def times_of(output: Path) -> dict[str, int]:
    """When each result was written; views, reports and Prefect's own files are made anew each time."""
    folders = ("world/images", "data/selection", "data/images", "data/scores", "data/dataset", "data/latents")
    files = [p for folder in (*folders, "data/manifest", "training", "samples") for p in (output / folder).rglob("*")]
    kept = [p for p in files if p.is_file() and p.name not in MADE_ANEW]
    return {p.relative_to(output).as_posix(): p.stat().st_mtime_ns for p in kept}


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, dict]:
    """A finished demo and its figures."""
    output = tmp_path_factory.mktemp("demo")
    figures, _ = run_demo(output)
    print(figures)
    return output, figures


def test_samples_show_the_colours_and_shapes_of_their_prompts(demo):
    _, figures = demo
    assert figures["color_seen"] >= 0.8
    assert figures["shape_seen"] >= 0.7
    assert figures["color_untrained"] <= 0.4
    assert figures["shape_untrained"] <= 0.4
    assert {"seconds", "color_unseen", "shape_unseen", "report"} <= figures.keys()


def test_guidance_of_3_follows_the_prompts_better_than_none(demo):
    output, figures = demo
    (found,) = output.glob("training/*/evaluation/results.json")
    rows = {row["guidance_scale"]: row for row in json.loads(found.read_text())["rows"]}
    assert rows[3.0]["agreement_demo_checker"] > rows[1.0]["agreement_demo_checker"]
    card = (found.parents[1] / "README.md").read_text()
    assert "agreement_demo_checker" in card
    names = ("curve", "image-to-image", "search", "memorised")
    shown = re.findall(r'src="([^"]+)"', Path(figures["report"]).read_text())
    assert {f"pictures/{name}.png" for name in (*names, *(f"drawn-{i}" for i in range(6)))} <= set(shown)


def test_the_funnel_adds_up_from_metadata_to_latents(demo):
    output, _ = demo
    with duckdb.connect(str(output / "data" / "metadata.duckdb"), read_only=True) as connection:
        rows = connection.execute("SELECT dropped, remaining FROM funnel").fetchall()
        latents = connection.execute("SELECT count(*) FROM latents").fetchone()
    for (_, before), (dropped, after) in pairwise(rows):
        assert before - dropped == after
    assert rows[0][1] == 2000
    assert rows[-1][1] == latents[0]


def test_every_image_of_the_report_exists(demo):
    _, figures = demo
    report = Path(figures["report"])
    sources = re.findall(r'src="([^"]+)"', report.read_text())
    assert len(sources) > 50
    assert all((report.parent / source).stat().st_size > 0 for source in sources)


def test_a_second_run_does_nothing_again(demo):
    output, figures = demo
    before = times_of(output)
    again, log = run_demo(output)
    print(f"second run: {again['seconds']} s")
    assert times_of(output) == before
    assert {**again, "seconds": 0} == {**figures, "seconds": 0}
    for stage in (*(stage.name for stage in stages_of(load_recipe("demo"))), "train"):
        assert f"{stage}: finished before, nothing to do" in log
