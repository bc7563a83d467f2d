"""Kill -9 at any moment of score, dedup, decide, pack and remove: the next run ends with the same bytes."""

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sdtrain.dataset.layout import DatasetDir
from tests.filters.removal_fixtures import NUM_ROWS, caption_of, copy_of, files_with, uid_of, url_of

# One process imports all that takes long, and forks another for each piece of work.
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
import filters.inspect.report, sdtrain.formats.frozen
from filters.dedup import DEDUP
from filters.decide.stage import DECIDE
from filters.recipe_record import read_recipe
from filters.remove.plan import find_removal
from filters.pipeline import STAGES
from filters.score.stage import SCORE
from filters.remove.apply import finish_removal, start_removal
from sdtrain.dataset.layout import DatasetDir
from sdtrain.pack.stage import PACK
from sdtrain.dataset.stage import clear_leftovers, pending, run_batch

def nothing(dataset):
    pass

def build(dataset):
    recipe = read_recipe(dataset)
    for stage in (SCORE, DEDUP, DECIDE, PACK):
        clear_leftovers(stage, dataset)
        shards = pending(stage, dataset, recipe)
        if shards:
            run_batch(stage, dataset, recipe, shards)

def remove(dataset):
    finish_removal(dataset)
    removal = find_removal(dataset, dataset.root.parent / "list.txt", "uid")
    if removal.has_effect:
        start_removal(dataset, removal)
        finish_removal(dataset)

for line in sys.stdin:
    what, root, kill_after_s = line.split()
    child = os.fork()
    if not child:
        globals()[what](DatasetDir(Path(root)))
        os._exit(0)
    if kill_after_s != "never":
        time.sleep(float(kill_after_s))
        os.kill(child, signal.SIGKILL)  # its number is still its own, for nobody has waited for it
    print(os.waitpid(child, 0)[1], flush=True)
"""
KILLS = int(os.environ.get("SDTRAIN_KILLS", "3"))  # `make test-kills` asks for 20
GONE = (2, 4, 9, 25)


class Forks:
    """Does pieces of work in processes of their own."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def do(self, what: str, dataset: DatasetDir, kill_after_s: float | None = None) -> bool:
        """Says whether the work came to its end."""
        self._process.stdin.write(f"{what} {dataset.root} {'never' if kill_after_s is None else kill_after_s}\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip() == "0"

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(30)


@pytest.fixture(scope="module")
def built(photo_dataset, photo_site, tmp_path_factory):
    """A finished dataset, and the port that its images came from."""
    dataset, port = copy_of(photo_dataset, tmp_path_factory.mktemp("kill")), photo_site[1]
    (dataset.root.parent / "list.txt").write_text("\n".join(uid_of(n, port) for n in GONE))
    return dataset, port


@pytest.fixture(scope="module")
def forks():
    forks = Forks()
    forks.do("nothing", DatasetDir(Path("nowhere")))  # it has imported what it needs
    yield forks
    forks.close()


def contents(dataset: DatasetDir) -> dict[str, bytes]:
    folders = ("selection", "images", "scores", "dataset", "latents")
    paths = [p for folder in folders for p in (dataset.root / folder).iterdir() if not p.name.endswith("_stats.json")]
    return {dataset.relative(p): p.read_bytes() for p in [*paths, dataset.decisions, dataset.duplicates]}


def kill_again_and_again(forks, what, make, seconds):
    """Datasets whose work was killed once and then done again; and how often the kill met it running."""
    rng, num_met = random.Random(3), 0
    for _ in range(KILLS):
        dataset = make("killed")
        is_met = not forks.do(what, dataset, rng.uniform(0, seconds))
        num_met += is_met
        seconds *= 1 if is_met else 0.7  # the machine was busier when the time was taken
        assert forks.do(what, dataset)
        yield dataset
        shutil.rmtree(dataset.root)
    assert num_met >= KILLS // 2


def timed(forks, what, dataset):
    started = time.monotonic()
    assert forks.do(what, dataset)
    return time.monotonic() - started


@pytest.mark.slow
@pytest.mark.parametrize("stages", [("score",), ("dedup",), ("decide", "pack")])
def test_stages(built, forks, stages):
    def make(name):
        dataset = DatasetDir(shutil.copytree(built[0].root, built[0].root.parent / name))
        files = {"dedup": [dataset.duplicates], "decide": [dataset.decisions, dataset.pack_plan]}
        files |= {
            "score": list(dataset.scores(0).parent.iterdir()),
            "pack": list(dataset.packed_tar(0).parent.iterdir()),
        }
        for stage in stages:
            shutil.rmtree(dataset.manifest_entry(stage, 0).parent)
            for path in files[stage]:
                path.unlink(missing_ok=True)
        return dataset

    undisturbed, expected = make("undisturbed"), contents(built[0])
    seconds = timed(forks, "build", undisturbed)
    shutil.rmtree(undisturbed.root)
    for dataset in kill_again_and_again(forks, "build", make, seconds):
        assert contents(dataset) == expected
        assert not list(dataset.root.rglob("*.partial"))


@pytest.mark.slow
def test_remove(built, forks):
    def make(name):
        return DatasetDir(shutil.copytree(built[0].root, built[0].root.parent / name))

    undisturbed = make("whole")
    seconds = timed(forks, "remove", undisturbed)
    expected, port = contents(undisturbed), built[1]
    words = [word for n in GONE for word in (uid_of(n, port), url_of(n, port), caption_of(n))]
    for dataset in kill_again_and_again(forks, "remove", make, seconds):
        assert contents(dataset) == expected
        assert files_with(dataset.root, words) == []
        assert not dataset.removal.exists()
        assert not list(dataset.root.rglob("*.partial"))
        digests = [pq.read_table(d.removed)["digest"].to_pylist() for d in (dataset, undisturbed)]
        assert set(digests[0]) == set(digests[1])
        assert sum(len(pq.read_table(d)) for d in (dataset.root / "selection").glob("*.parquet")) == NUM_ROWS - 5
