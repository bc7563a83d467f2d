"""Stage `score`: ViT-L/14 with heads and watermark detector, fed by CPU and by GPU decoding."""

from __future__ import annotations

import time
from collections.abc import Callable
from unittest import mock

from filters.score.jpeg_decoder import Fallbacks, find_decoder, why_no_decoder
from filters.score.models import Models, load_models
from filters.score.pipeline import num_threads, score_rows
from tests.benchmarks.score import make_shards, run_networks, settings
from tests.benchmarks.training_loops import CUDA
from tests.gpu_check.child import Check


def score(check: Check) -> None:
    config, num_images, num_shards = settings(quick=True)
    if check.is_small:
        num_images = 8
        config = config.model_copy(update={"clip_model": "ViT-demo", "batch_size": 4})
    dataset, shards = make_shards(check.work / "score", num_images, num_images // num_shards), list(range(num_shards))
    models = load_models(config)
    check.record(model=config.clip_model, dtype=config.dtype, images=num_images, decoding_threads=num_threads())
    fallbacks = Fallbacks()

    def run(on_gpu: bool) -> None:
        with mock.patch("filters.score.pipeline.Fallbacks", return_value=fallbacks):
            for _, rows in score_rows(dataset, shards, models, config.batch_size, on_gpu):
                assert all(row["reason"] is None for row in rows)

    run_networks(models, config.batch_size, num_images)  # so that nothing is chosen or allocated for the first time
    contenders: dict[str, Callable[[], None]] = {
        "networks_alone": lambda: run_networks(models, config.batch_size, num_images),
        "cpu_decoding": lambda: run(on_gpu=False),
    }
    if _has_gpu_decoder(check, models):
        contenders["gpu_decoding"] = lambda: run(on_gpu=True)
    for name, work in contenders.items():
        started = time.perf_counter()
        work()
        check.record(**{f"{name}_images_per_s": round(num_images / (time.perf_counter() - started), 1)})
    if "gpu_decoding" in contenders:
        check.record(decoded_by_gpu=fallbacks.num_decoded, left_to_cpu=dict(fallbacks.counts))
        check.expect(fallbacks.num_decoded == num_images, f"the GPU decoded {fallbacks.num_decoded} of {num_images}")


def _has_gpu_decoder(check: Check, models: Models) -> bool:
    """Records which library decodes on the GPU, or why none does."""
    if not CUDA:
        check.record(gpu_decoder="none: there is no GPU")
        return False
    why = why_no_decoder(models.device)
    check.record(gpu_decoder=find_decoder()[0] if why is None else f"none: {why}")
    check.expect(why is None, f"JPEGs are decoded on the CPU: {why}")
    return why is None
