"""The download stage on 500 and on 2,000 shards of one row each, over loopback: what shards cost beside their images.

    python -m tests.benchmarks.download_growth

Small images, so that the cost of a shard shows; a second run, with nothing to do, is timed too. Growth is that for 4
times the shards, and 4 is linear; seconds are by the clock and of the processor. The server shares the machine's cores.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from sdtrain.dataset.config import DownloadConfig
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import describe_outputs, write_entry
from sdtrain.dataset.shard_report import ShardReport
from sdtrain.dataset.terminal_progress import run_with_bar
from sdtrain.download.stage import DOWNLOAD
from tests.benchmarks.image_server import serve_photos

FEW, MORE = 500, 2_000
_NUM_IMAGES = 20


@dataclass(frozen=True)
class BenchmarkRecipe:
    """The part of a recipe that a download reads; as shipped, but for what loopback needs."""

    download: DownloadConfig = field(default=DownloadConfig(allow_private_hosts=True, requests_per_host_s=1e6))
    source: None = None


def prepare(folder: Path, start: str, num_shards: int) -> DatasetDir:
    """A dataset with one row in each shard's selection."""
    dataset = DatasetDir(folder)
    selections = [dataset.selection(shard) for shard in range(num_shards)]
    selections[0].parent.mkdir(parents=True)
    for shard, path in enumerate(selections):
        row = {"key": f"{10 * shard:06d}", "uid": f"{shard:032x}", "caption": "an image"}
        row["url"] = f"{start}/{shard}/{shard % _NUM_IMAGES}.jpg"
        pq.write_table(pa.Table.from_pylist([row]), path)
    outputs = describe_outputs(dataset, selections)
    counts = {"num_in": num_shards, "num_out": num_shards}
    write_entry(dataset, ShardReport(stage="select", shard=0, outputs=outputs, **counts))
    return dataset


def measure(dataset: DatasetDir, num_shards: int) -> dict[str, float]:
    """Seconds of the stage, and of a run with nothing to do."""
    seconds = {}
    for name in ("stage", "nothing_to_do"):
        started, before = time.monotonic(), os.times()
        done = run_with_bar(DOWNLOAD, dataset, BenchmarkRecipe())
        after = os.times()
        seconds[f"{name}_s"] = round(time.monotonic() - started, 2)
        seconds[f"{name}_cpu_s"] = round(sum(after[:4]) - sum(before[:4]), 2)
        if name == "stage":
            assert done.num_out == num_shards, done
    return seconds


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "photos").mkdir()
        for number in range(_NUM_IMAGES):
            Image.effect_noise((64, 64), number + 1).convert("RGB").save(folder / "photos" / f"{number}.jpg")
        with serve_photos(folder / "photos", folder / "ca.pem") as starts:
            run_with_bar(DOWNLOAD, prepare(folder / "first", starts["http"], 4), BenchmarkRecipe())
            seconds = {num: measure(prepare(folder / str(num), starts["http"], num), num) for num in (FEW, MORE)}
    growth = {f"growth_{name}": round(seconds[MORE][name] / seconds[FEW][name], 2) for name in seconds[FEW]}
    print(json.dumps({str(num): found for num, found in seconds.items()} | growth))


if __name__ == "__main__":
    main()
