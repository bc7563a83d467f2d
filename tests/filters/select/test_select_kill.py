"""A selection that is killed at any moment leaves nothing half done, and the next run gives the same bytes."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import duckdb
import pytest

NUM_ROWS = 300_000
KILLS = int(os.environ.get("SDTRAIN_KILLS", "3"))  # `make test-kills` asks for 20
PROGRAM = """
import json, sys
from pathlib import Path
from filters.select.stage import SELECT
from filters.recipe import Recipe
from filters.select_config import SelectConfig
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.stage import clear_leftovers, pending, run_batch
dataset = DatasetDir(Path(sys.argv[1]))
recipe = Recipe(name="r", select=SelectConfig(metadata=sys.argv[2], samples_per_shard=2000, rules={"min_side": 512}))
print("ready", flush=True)
clear_leftovers(SELECT, dataset)
run_batch(SELECT, dataset, recipe, pending(SELECT, dataset, recipe))
"""


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    folder = tmp_path_factory.mktemp("metadata")
    duckdb.sql(
        f"""
        COPY (SELECT 'https://example.com/' || i % {NUM_ROWS - 9000} || '.jpg' AS URL, 'a caption' AS TEXT,
            (400 + hash(i) % 900)::INTEGER AS WIDTH, 800 AS HEIGHT FROM range({NUM_ROWS}) t(i))
        TO '{folder}/a.parquet' (ROW_GROUP_SIZE 50000)
        """
    )
    return folder


def start(root, metadata):
    root.mkdir(exist_ok=True)
    command = [sys.executable, "-c", PROGRAM, str(root), str(metadata)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def digests(root):
    files = sorted((root / "selection").iterdir())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_kill_9_at_random_moments_of_a_selection_then_rerun_gives_the_same_bytes(metadata, tmp_path):
    started = time.monotonic()
    process = start(tmp_path / "undisturbed", metadata)
    began = time.monotonic()
    assert process.wait(200) == 0
    ended = time.monotonic()
    expected = digests(tmp_path / "undisturbed")
    assert len(expected) > 100

    root, rng, num_killed = tmp_path / "killed", random.Random(11), 0
    for _ in range(KILLS):
        process = start(root, metadata)
        time.sleep(rng.uniform(0, ended - began))
        num_killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        (root / "manifest" / "select" / "00000.json").unlink(missing_ok=True)  # so that there is something to kill
        for path in (root / "selection").glob("*.parquet"):
            assert hashlib.sha256(path.read_bytes()).hexdigest() == expected[path.name], "half a shard has a final name"
    assert start(root, metadata).wait(200) == 0
    assert digests(root) == expected
    assert sorted(path.name for path in root.iterdir()) == ["manifest", "selection"]
    entry = json.loads((root / "manifest" / "select" / "00000.json").read_text())
    assert entry["num_in"] == NUM_ROWS == entry["num_out"] + sum(entry["dropped"].values())
    assert num_killed >= KILLS // 2, f"too few of the kills hit a running selection ({ended - started:.1f} s in all)"
