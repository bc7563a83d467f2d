"""The stages of the check, in their order: what everything rests on first, what takes long last."""

from __future__ import annotations

from tests.gpu_check.stage import Limits, Stage

_SETTINGS = ("numpy", "pyarrow", "pydantic", "yaml")
_NETWORKS = (*_SETTINGS, "diffusers", "transformers", "safetensors", "PIL")
_TRAINING = (*_NETWORKS, "deepspeed", "hjson", "psutil", "matplotlib", "jinja2", "tensorboard")
_DATASET = (*_NETWORKS, "certifi", "cv2", "duckdb", "mmh3", "torchvision")
_SCORING = (*_DATASET, "ftfy", "open_clip", "timm")

STAGES = (
    Stage(
        "machine",
        "Versions, a matrix product, a copy on the device",
        "tests.gpu_check.machine:measure",
        ("numpy", "pyarrow"),
        on_gpu=Limits(10, 30),
    ),
    Stage(
        "networks",
        "The UNet on the device next to the CPU, for each attention kernel and memory layout",
        "tests.gpu_check.networks:compare",
        _NETWORKS,
        on_gpu=Limits(30, 90),
    ),
    Stage(
        "resume",
        "A killed run that goes on, next to one that was left alone",
        "tests.gpu_check.resume:kill_and_compare",
        _TRAINING,
        on_gpu=Limits(35, 80),
    ),
    Stage(
        "profile",
        "Training, and what two of its micro-steps consist of",
        "tests.gpu_check.training:profile",
        _TRAINING,
        on_gpu=Limits(45, 90),
    ),
    Stage(
        "ladder",
        "Optimizations, one after the other",
        "tests.gpu_check.training:climb_ladder",
        _TRAINING,
        on_gpu=Limits(60, 180),
    ),
    Stage(
        "best",
        "The full training loop with what pays",
        "tests.gpu_check.training:run_best",
        _TRAINING,
        on_gpu=Limits(45, 110),
    ),
    Stage(
        "encode",
        "Encoding next to the bare VAE",
        "tests.gpu_check.data:encode",
        _DATASET,
        on_gpu=Limits(25, 60),
    ),
    Stage(
        "sample",
        "Sampling 16 images",
        "tests.gpu_check.sampling:sample",
        (*_NETWORKS, "matplotlib", "pandas"),
        on_gpu=Limits(30, 60),
    ),
    Stage(
        "score",
        "Scoring with CPU and GPU decoding",
        "tests.gpu_check.scoring:score",
        _SCORING,
        on_gpu=Limits(35, 75),
    ),
    Stage(
        "data",
        "Batches from the loader next to what training takes",
        "tests.gpu_check.data:load",
        _TRAINING,
        on_gpu=Limits(15, 40),
    ),
)
