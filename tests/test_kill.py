"""Kill -9 at any moment loses nothing that was finished; a second run gives the same bytes."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from filters.recipe import RECIPES_DIR
from sdtrain.demo.server import serve_world
from sdtrain.demo.world import make_world

STAGES = ("select", "download", "score", "dedup", "decide", "pack", "encode")
STEPS_WHOSE_FILES_MATTER = ("selection", "images", "scores", "dataset", "latents")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A served world of 120 rows."""
    world = make_world(tmp_path_factory.mktemp("world"), num_rows=120, http_port=0, https_port=0)
    with serve_world(world):
        yield world


@pytest.fixture(scope="module")
def recipe(world, tmp_path_factory) -> Path:
    """The demo's recipe on the small world, with several shards a stage."""
    content = yaml.safe_load((RECIPES_DIR / "demo.yaml").read_text())
    content["select"] |= {"metadata": str(world.metadata), "samples_per_shard": 15}
    content["download"]["shards_per_process"] = 2
    content["pack"]["samples_per_shard"] = 12
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def start_build(recipe: Path, output: Path) -> subprocess.Popen:
    """`sdtrain build` as the leader of its own process group."""
    command = [sys.executable, "-m", "sdtrain.cli", "build", str(recipe), "--output", str(output)]
    return subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def build(recipe: Path, output: Path) -> None:
    process = start_build(recipe, output)
    log, _ = process.communicate(timeout=200)
    assert process.returncode == 0, log


def kill_during(stage: str, recipe: Path, output: Path, delay_s: float) -> bool:
    """Kills the whole tree `delay_s` after `stage` has begun; says whether it was still running."""
    process = start_build(recipe, output)
    before = output / "manifest" / STAGES[STAGES.index(stage) - 1] if stage != "select" else output.parent
    deadline = time.monotonic() + 120
    while process.poll() is None and not before.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(delay_s)
    running = process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return running


def digests(output: Path) -> dict[str, str]:
    files = [p for folder in STEPS_WHOSE_FILES_MATTER for p in (output / folder).rglob("*")]
    files += [output / "duplicates.parquet", output / "decisions.parquet"]
    wanted = [p for p in files if p.is_file() and not p.name.endswith("_stats.json")]
    return {p.relative_to(output).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in wanted}


@pytest.mark.slow
@pytest.mark.first
@pytest.mark.timeout(900)
def test_kill_9_in_every_stage_then_rerun_gives_the_bytes_of_an_undisturbed_run(recipe, tmp_path):
    build(recipe, tmp_path / "undisturbed")
    expected = digests(tmp_path / "undisturbed")
    assert any(name.startswith("latents/") for name in expected)

    rng = random.Random(7)
    killed = {stage: kill_during(stage, recipe, tmp_path / "killed", rng.uniform(0, 1.5)) for stage in STAGES}
    build(recipe, tmp_path / "killed")

    assert digests(tmp_path / "killed") == expected
    assert not list((tmp_path / "killed").rglob("*.partial")), "leftovers of killed runs were not cleared"
    assert sum(killed.values()) >= 4, f"too few kills hit a running build: {killed}"
