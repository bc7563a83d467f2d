"""Commands over datasets of many shards: seconds, memory, and their growth with the number of shards.

    python -m tests.benchmarks.scale [--quick] [--folder DIR]

Simulates finished datasets of 2,000, 8,000 and, without --quick, 132,000 shards (laion2B-en at 10,000 rows a shard),
of two rows each (`tests.benchmarks.scale_world`), and runs each command as a user would, in a process of its own.
Growth is that of the time beyond what the same command takes on 500 shards, which start-up dominates; 4 is linear.
Seconds are by the clock, or of the processor where other work runs beside it (--cpu).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import entries
from tests.benchmarks.scale_world import real_uids, write_world
from tests.training_fixtures import write_config

BASE, SMALL, LARGE, LAION = 500, 2_000, 8_000, 132_000
_TRAINING = """
import sys
from sdtrain.config import load_config
from sdtrain.formats.frozen import vae_scaling_factor
from sdtrain.loading.sources import open_samples, require_samples
config = load_config(sys.argv[1])
require_samples(config.data)
print(len(open_samples(config, vae_scaling_factor(config.vae))))
"""
_WATCH = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)
sys.exit(code)
"""
"""A small process between: a fork of this one would count our own memory as the command's."""


@dataclass(frozen=True)
class Cost:
    """What one command took: seconds by the clock and of the processor, and its largest resident memory."""

    wall_s: float
    cpu_s: float
    rss_mb: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="without the 132,000 shards")
    parser.add_argument("--cpu", action="store_true", help="print seconds of the processor: other work runs beside it")
    parser.add_argument("--folder", type=Path, help="where datasets are made, and found again (default: temporary)")
    arguments = parser.parse_args()
    sizes = (BASE, SMALL, LARGE) if arguments.quick else (BASE, SMALL, LARGE, LAION)
    with _folder(arguments.folder) as folder:
        costs = {size: _measure_size(folder, size) for size in sizes}
    print(json.dumps(figures(costs, arguments.cpu)))


def figures(costs: Mapping[int, Mapping[str, Cost]], is_cpu: bool = False) -> dict[str, object]:
    """Seconds at 132,000 shards, measured or extrapolated along a line, growth per 4 times the shards, and memory."""

    def seconds(size: int, command: str) -> float:
        cost = costs[size][command]
        return cost.cpu_s if is_cpu else cost.wall_s

    def at_laion(command: str) -> float:
        if LAION in costs:
            return round(seconds(LAION, command), 1)
        slope = (seconds(LARGE, command) - seconds(SMALL, command)) / (LARGE - SMALL)
        return round(seconds(LARGE, command) + slope * (LAION - LARGE), 1)

    def growth(command: str) -> float:
        """Of the time beyond start-up: (8,000 - base) / (2,000 - base), as of 4 for 1."""
        begun = seconds(BASE, command)
        per_shard = [(seconds(size, command) - begun) / (size - BASE) for size in (SMALL, LARGE)]
        return round(4 * per_shard[1] / max(per_shard[0], 1e-9), 2)

    commands = list(costs[LARGE])
    return {
        "noop_build_s": at_laion("build"),
        "growth_4x": {command: growth(command) for command in commands},
        **{f"{command.replace(' ', '_')}_s": at_laion(command) for command in commands if command != "build"},
        "peak_rss_mb": round(max(cost.rss_mb for cost in costs[max(costs)].values())),
        "extrapolated": LAION not in costs,
    }


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _measure_size(folder: Path, num_shards: int) -> dict[str, Cost]:
    at = folder / str(num_shards)
    done = at / "written"
    if not done.exists():
        shutil.rmtree(at, ignore_errors=True)
        began = time.monotonic()
        write_world(at, num_shards)
        done.touch()
        print(f"{num_shards:,} shards written in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    costs = {}
    for name, prepare, command in _commands(at):
        prepare()
        costs[name] = _run(command)
        cost = costs[name]
        print(
            f"{num_shards:,} {name}: {cost.wall_s:.1f} s ({cost.cpu_s:.1f} of the processor), {cost.rss_mb:.0f} MB",
            file=sys.stderr,
            flush=True,
        )
    return costs


def _commands(folder: Path) -> Iterator[tuple[str, Callable[[], object], list[str]]]:
    data = DatasetDir(folder / "data")

    def sdtrain(*arguments: object) -> list[str]:
        return [sys.executable, "-m", "sdtrain.cli", *map(str, arguments)]

    def nothing() -> None:
        pass

    build = sdtrain("build", data.recipe, "--output", data.root)
    yield "first look", nothing, sdtrain("status", data.root)
    yield "status", nothing, sdtrain("status", data.root)
    yield "build", nothing, build
    yield "funnel", nothing, sdtrain("funnel", data.root)
    yield "decide", nothing, sdtrain("decide", data.root, "--dry-run")
    yield "query", nothing, sdtrain("query", data.root, "SELECT * FROM images LIMIT 1")
    yield "views", nothing, sdtrain("views", data.root)
    config = folder / "config.yaml"
    yield (
        "start of training",
        lambda: write_config(config, folder / "models", data.root),
        [sys.executable, "-c", _TRAINING, str(config)],
    )
    listed = folder / "removed.txt"

    yield "build of one", lambda: _forget_one(data), build
    remove = sdtrain("remove", data.root, "--list", listed, "--by", "uid")
    yield "remove", lambda: listed.write_text("\n".join(_present(data)[:10])), remove


def _present(dataset: DatasetDir) -> list[str]:
    """The samples with real tars that were not removed when the folder was measured before."""
    decided = pq.read_table(dataset.decisions, columns=["uid", "reason"])
    kept = set(decided.filter(pc.is_null(decided["reason"]))["uid"].to_pylist())
    return [uid for uid in real_uids(dataset) if uid in kept]


def _forget_one(dataset: DatasetDir) -> None:
    """Makes the latents of one real sample unfinished."""
    tables = (dataset.packed_table(entry.shard) for entry in entries(dataset, "pack"))
    last = _present(dataset)[-1]
    table = next(table for table in tables if last in pq.read_table(table)["uid"].to_pylist())
    dataset.manifest_entry("encode", int(table.stem)).unlink(missing_ok=True)


def _run(command: list[str]) -> Cost:
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", _WATCH, *command], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}")
    cpu_s, rss_mb = map(float, done.stdout.splitlines()[-1].split())
    return Cost(time.monotonic() - began, cpu_s, rss_mb)


if __name__ == "__main__":
    main()
