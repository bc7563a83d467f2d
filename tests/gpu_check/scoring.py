"""Stage `score`: ViT-L/14 with heads and watermark detector, fed by CPU and by GPU decoding."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from filters.score.models import Models, load_models
from filters.score.pipeline import num_threads, score_rows
from filters.score.preprocess import read_shard
from sdtrain.dataset.layout import DatasetDir
from tests.benchmarks.score import make_shards, run_networks, settings
from tests.benchmarks.training_loops import CUDA
from tests.gpu_check.child import Check


def score(check: Check) -> None:
    config, num_images, num_shards = settings(quick=True)
    if check.is_small:
        num_images = 8
        config = config.model_copy(update={"batch_size": 4})
    dataset, shards = make_shards(check.work / "score", num_images, num_images // num_shards), list(range(num_shards))
    models = load_models(config)
    check.record(model=config.clip_model, dtype=config.dtype, images=num_images, decoding_threads=num_threads())

    def run(on_gpu: bool) -> None:
        for _, rows in score_rows(dataset, shards, models, config.batch_size, on_gpu):
            assert all(row["reason"] is None for row in rows)

    contenders: dict[str, Callable[[], None]] = {
        "networks_alone": lambda: run_networks(models, config.batch_size, num_images),
        "cpu_decoding": lambda: run(on_gpu=False),
    }
    if CUDA:
        check.record(gpu_decoder=_gpu_decoder(dataset, models))
        contenders["gpu_decoding"] = lambda: run(on_gpu=True)
    else:
        check.record(gpu_decoder="none: there is no GPU")
    for name, work in contenders.items():
        if name == "networks_alone":
            work()  # once, so that nothing is chosen or allocated for the first time
        started = time.perf_counter()
        work()
        check.record(**{f"{name}_images_per_s": round(num_images / (time.perf_counter() - started), 1)})
    if CUDA:
        check.expect(check.figure("gpu_decoder") == "nvJPEG", "the GPU did not decode")


def _gpu_decoder(dataset: DatasetDir, models: Models) -> str:
    """What decodes when the GPU is told to: nvJPEG, or what stands in its way."""
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    sample: Any = next(iter(read_shard(dataset, 0)))
    data = torch.frombuffer(bytearray(sample.image), dtype=torch.uint8)
    try:
        (decoded,) = decode_jpeg([data], ImageReadMode.RGB, device=models.device)
    except RuntimeError as error:
        return f"CPU, for the GPU's decoder says: {str(error)[:300]}"
    return "nvJPEG" if decoded.device.type == "cuda" else f"a decoder on {decoded.device}"
