"""Downloads over loopback: ours beside stock img2dataset, and the flow beside the plain function, in one run.

    python -m tests.benchmarks.download [--quick]

The same images, settings and output on both sides: keep_ratio 512, JPEG 95, always re-encoded, EXIF and sha256 noted,
two processes with the same number of requests at once. The server shares the machine's cores with both. The figures
compare whole commands, start and end included, which is what a user waits for. The lines before them give the
speed between the start of the first shard and the end of the last too: there, over HTTP, both do little else than
decode and resize, by the same code, and are about equal.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sdtrain.dataset.config import DownloadConfig
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import describe_outputs, write_entry
from sdtrain.dataset.shard_report import ShardReport
from sdtrain.dataset.stage import run_batch
from sdtrain.dataset.tars import index_samples
from sdtrain.download.stage import DOWNLOAD
from tests.benchmarks.image_server import serve_photos
from tests.benchmarks.photos import draw_photos

CONNECTIONS, PROCESSES, SHARDS_PER_PROCESS = 32, 2, 4
NUM_SHARDS = PROCESSES * SHARDS_PER_PROCESS
CONFIG = DownloadConfig(
    reencode="always",
    connections=CONNECTIONS,
    connections_per_host=CONNECTIONS,
    requests_per_host_s=1e6,
    allow_private_hosts=True,
    shards_per_process=SHARDS_PER_PROCESS,
)


@dataclass(frozen=True)
class Size:
    """How much work."""

    images: int
    rows: int
    slow_rows: int
    """For img2dataset over https, which takes seven times as long."""
    flow_rounds: int


FULL, QUICK = Size(280, 6000, 1200, 2), Size(60, 800, 200, 1)


@dataclass(frozen=True)
class BenchmarkRecipe:
    """The part of a recipe that a download reads."""

    download: DownloadConfig = field(default=CONFIG)
    source: None = None


def urls(start: str, size: Size, rows: int) -> list[str]:
    return [f"{start}/{number}/{number % size.images}.jpg" for number in range(rows)]


def prepare(folder: Path, links: list[str]) -> DatasetDir:
    """A dataset with these URLs selected, in `NUM_SHARDS` shards."""
    dataset, per_shard = DatasetDir(folder), -(-len(links) // NUM_SHARDS)
    selections = [dataset.selection(shard) for shard in range(NUM_SHARDS)]
    selections[0].parent.mkdir(parents=True)
    for shard, path in enumerate(selections):
        part = links[shard * per_shard : (shard + 1) * per_shard]
        keys = [f"{10_000 * shard + index:09d}" for index in range(len(part))]
        table = {"key": keys, "uid": keys, "url": part, "caption": [f"image {key}" for key in keys]}
        pq.write_table(pa.table(table), path)
    outputs = describe_outputs(dataset, selections)
    write_entry(dataset, ShardReport(stage="select", shard=0, num_in=len(links), num_out=len(links), outputs=outputs))
    return dataset


def run_ours(folder: Path, links: list[str]) -> Path:
    """The plain function, two batches at once on threads, as the flow does it."""
    run_plain(prepare(folder, links))
    return folder / "images"


def run_plain(dataset: DatasetDir) -> None:
    with ThreadPoolExecutor(PROCESSES) as threads:
        batches = [list(range(NUM_SHARDS))[p * SHARDS_PER_PROCESS :][:SHARDS_PER_PROCESS] for p in range(PROCESSES)]
        for done in [threads.submit(run_batch, DOWNLOAD, dataset, BenchmarkRecipe(), batch) for batch in batches]:
            done.result()


def run_stock(folder: Path, links: list[str]) -> Path:
    """img2dataset's own command."""
    folder.mkdir()
    numbers = [f"image {number}" for number in range(len(links))]
    pq.write_table(pa.table({"url": links, "caption": numbers}), folder / "rows.parquet")
    options = {
        "url_list": folder / "rows.parquet",
        **{"input_format": "parquet", "url_col": "url", "caption_col": "caption"},
        **{"output_folder": folder / "out", "output_format": "webdataset", "number_sample_per_shard": len(links) // 8},
        **{"processes_count": PROCESSES, "thread_count": CONNECTIONS, "image_size": CONFIG.image_size},
        **{"resize_mode": CONFIG.resize_mode, "resize_only_if_bigger": True, "encode_quality": CONFIG.encode_quality},
        **{"extract_exif": True, "compute_hash": "sha256", "enable_wandb": False},
    }
    command = [str(Path(sys.executable).with_name("img2dataset")), *(f"--{n}={value}" for n, value in options.items())]
    with (folder / "log.txt").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, env=os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1"})
    return folder / "out"


def measure(name: str, run: Callable[[Path, list[str]], Path], folder: Path, links: list[str]) -> tuple[float, float]:
    """Images in a second of the whole command, and their mean size in bytes."""
    started, before = time.monotonic(), os.times()
    images = run(folder, links)
    wall_s, after = time.monotonic() - started, os.times()
    stats = [json.loads(path.read_text()) for path in images.glob("*_stats.json")]
    assert sum(shard["successes"] for shard in stats) == len(links), f"{name} failed: {stats[0]['status_dict']}"
    seconds = max(shard["end_time"] for shard in stats) - min(shard["start_time"] for shard in stats)
    image_bytes = [s.members["jpg"].size for path in sorted(images.glob("*.tar")) for s in index_samples(path)]
    speed, mean_bytes = len(links) / wall_s, sum(image_bytes) / len(image_bytes)
    cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
    print(
        f"{name:19} {speed:6.1f} img/s ({len(links) / seconds:6.1f} within shards), {cpu_s / len(links) * 1e3:5.1f} ms "
        f"of CPU each, {len(links)} images of {mean_bytes / 1e3:.1f} kB in {wall_s:.1f} s",
        flush=True,
    )
    return speed, mean_bytes


def warm_up(start: str, size: Size, folder: Path) -> None:
    """A few rows by both, so that both find their modules compiled, whatever the environment says of that."""
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(folder / "compiled")}
    for name, run in {"stock": run_stock, "ours": run_ours}.items():
        run(folder / f"{name}-first", urls(start, size, NUM_SHARDS))


def ratio_to_stock(scheme: str, start: str, size: Size, folder: Path) -> float:
    stock_rows = size.slow_rows if scheme == "https" else size.rows
    stock, stock_bytes = measure(
        f"img2dataset, {scheme}", run_stock, folder / f"stock-{scheme}", urls(start, size, stock_rows)
    )
    ours, our_bytes = measure(f"sdtrain, {scheme}", run_ours, folder / f"ours-{scheme}", urls(start, size, size.rows))
    # The same encoder on the same pixels; of another number of rows the mean may differ a little.
    assert abs(our_bytes / stock_bytes - 1) < (0.1 if stock_rows != size.rows else 1e-9)
    return ours / stock


def flow_overhead(start: str, size: Size, folder: Path) -> float:
    """How much longer the flow's stage takes than the plain function; the best of some rounds on both sides."""
    from prefect import flow

    from flows.support.stage_runner import StageOptions, run_stage

    options = StageOptions(workers=PROCESSES, shards_per_task=SHARDS_PER_PROCESS)

    @flow(name="benchmark-download")
    def in_flow() -> dict[str, float]:
        best: dict[str, float] = {}
        # What is imported and started with the first task is paid once, however long a flow runs.
        run_stage(DOWNLOAD, prepare(folder / "first", urls(start, size, NUM_SHARDS)), BenchmarkRecipe(), options)
        for number in range(size.flow_rounds):
            for name, run in {
                "flow": lambda dataset: run_stage(DOWNLOAD, dataset, BenchmarkRecipe(), options),
                "plain": run_plain,
            }.items():
                dataset = prepare(folder / f"{name}-{number}", urls(start, size, size.rows))
                started = time.monotonic()
                run(dataset)
                best[name] = min(best.get(name, 1e9), time.monotonic() - started)
        return best

    best = in_flow()
    print(f"flow {best['flow']:.2f} s, plain function {best['plain']:.2f} s")
    return best["flow"] / best["plain"] - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few hundred rows")
    from flows.support.task_runners import own_prefect

    size = QUICK if parser.parse_args().quick else FULL
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        mean = draw_photos(folder / "photos", size.images)
        print(f"{size.images} images of {mean / 1e3:.0f} kB", flush=True)
        with serve_photos(folder / "photos", folder / "ca.pem") as starts:
            os.environ["SSL_CERT_FILE"] = str(folder / "ca.pem")
            warm_up(starts["http"], size, folder)
            figures = {
                f"{scheme}_vs_img2dataset": round(ratio_to_stock(scheme, starts[scheme], size, folder), 2)
                for scheme in ("https", "http")
            }
            with own_prefect(folder / "prefect"):
                overhead = flow_overhead(starts["http"], size, folder)
            # Prefect says goodbye when Python ends; the figures are to be the last line.
            logging.getLogger("prefect").setLevel(logging.WARNING)
    print(json.dumps(figures | {"flow_overhead": round(overhead, 3)}))


if __name__ == "__main__":
    main()
