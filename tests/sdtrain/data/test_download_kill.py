"""Kill -9 at any moment of a download loses nothing that was finished; a second run gives the same bytes."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from download_fixtures import Build, encoded, photo, prepare, serve_site

from sdtrain.data.download import DOWNLOAD
from sdtrain.data.retry import retry_failed
from sdtrain.data.stage import clear_leftovers, pending

PROGRAM = """
import sys
from pathlib import Path
from download_fixtures import Build, BuildRecipe, DownloadConfig
from sdtrain.data.dataset import DatasetDir
from sdtrain.data.retry import retry_failed
build = Build(DatasetDir(Path(sys.argv[1])), BuildRecipe(DownloadConfig.model_validate_json(sys.argv[2])))
if sys.argv[3] == "retry":
    retry_failed(build.dataset, build.recipe, reasons=["http_404"])
else:
    build.run()
"""
KILLS = 20


def start(build: Build, what: str) -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM, str(build.dataset.root), build.recipe.download.model_dump_json(), what]
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[3]}"}
    return subprocess.Popen(command, env=environment, start_new_session=True)


def digests(build: Build) -> dict[str, str]:
    folder = build.dataset.root / "images"
    paths = [p for p in folder.iterdir() if not p.name.endswith("_stats.json")]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def killed_until_done(build: Build, what: str, seconds: float, chance: random.Random) -> int:
    """Runs again and again, each time killed at a random moment; returns how often it was killed while it ran."""
    kills = 0
    for _ in range(KILLS):
        process = start(build, what)
        time.sleep(chance.uniform(0.3, 1) * seconds)
        kills += process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return kills


def timed(build: Build, what: str) -> float:
    started = time.monotonic()
    assert start(build, what).wait() == 0
    return time.monotonic() - started


@pytest.fixture
def site():
    with serve_site() as site:
        site.bodies = {f"photo/{n}.jpg": encoded(photo(n, 400, 300)) for n in range(240)}
        yield site


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_download_killed_20_times_gives_the_bytes_of_an_undisturbed_one(site, tmp_path):
    urls = [site.url(path) for path in site.bodies] + [site.url("missing/1")]
    undisturbed = prepare(tmp_path / "undisturbed", urls, per_shard=8)
    seconds = timed(undisturbed, "build")
    build = prepare(tmp_path / "killed", urls, per_shard=8)
    kills = killed_until_done(build, "build", seconds, random.Random(3))
    while pending(DOWNLOAD, build.dataset, build.recipe):
        clear_leftovers(DOWNLOAD, build.dataset)
        build.run()
    assert digests(build) == digests(undisturbed)
    assert kills >= 5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_retry_killed_20_times_loses_nothing(site, tmp_path):
    urls = [site.url(path) for path in site.bodies]
    undisturbed = prepare(tmp_path / "undisturbed", urls, per_shard=8)
    undisturbed.run()
    site.status = {path: 404 for number, path in enumerate(site.bodies) if number % 3 == 0}
    builds = [prepare(tmp_path / name, urls, per_shard=8) for name in ("timed", "killed")]
    for build in builds:
        build.run()
    had = {row["key"] for row in builds[1].rows() if row["reason"] is None}
    site.status = {}
    seconds = timed(builds[0], "retry")
    assert digests(builds[0]) == digests(undisturbed)

    site.asked.clear()
    kills = killed_until_done(builds[1], "retry", seconds, random.Random(5))
    clear_leftovers(DOWNLOAD, builds[1].dataset)
    builds[1].run(pending(DOWNLOAD, builds[1].dataset, builds[1].recipe) or [0])
    retry_failed(builds[1].dataset, builds[1].recipe, reasons=["http_404"])
    assert digests(builds[1]) == digests(undisturbed)
    # What was had before was never fetched again.
    keys = {row["url"].split("/", 3)[3]: row["key"] for row in builds[1].rows()}
    assert not {keys[path] for path in site.asked} & had
    assert kills >= 5
