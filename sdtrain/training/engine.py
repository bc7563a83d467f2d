"""DeepSpeed's configuration and engine for the UNet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import deepspeed
import torch

from sdtrain.config import TrainConfig
from sdtrain.errors import UserError
from sdtrain.models.backends import replays_graphs
from sdtrain.training.optimizer import make_adamw

_OURS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "optimizer",
    "scheduler",
    "communication_data_type",
    "data_types",
)
_HEEDED = ("fp16", "gradient_clipping")
"""What our own optimizer step does as a DeepSpeed JSON says."""
_BUCKET_NUMEL = 200_000_000


def deepspeed_config(config: TrainConfig, accumulation: int, num_parameters: int, extra: Path | None) -> dict[str, Any]:
    """DeepSpeed's settings for a run, overridden by those of the JSON file `extra`.

    ZeRO-1 by default: it reduces gradients once per optimizer step, stages 2 and 3 on every micro-step. In bf16 the
    loop stops on a loss that is not finite, so DeepSpeed's check, which waits for the device and silently skips steps,
    is off; so is its throughput timer, which waits twice in each step. `num_parameters` caps the gradient buckets.
    UserError if the file is not JSON, sets what the training config decides, or does not go with its CUDA graphs.
    """
    _require_own_gradients(config, extra)
    bucket = min(_BUCKET_NUMEL, num_parameters)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optimizer.max_grad_norm,
        "zero_optimization": {"stage": config.zero_stage, "reduce_bucket_size": bucket},
        "bf16": {"enabled": config.precision == "bf16", "check_grad_overflow": False},
        "fp16": {"enabled": config.precision == "fp16", "hysteresis": 1},
        "data_types": {"grad_accum_dtype": _gradient_dtype(config)},
        "communication_data_type": "fp32" if config.speed.fp32_gradients else config.precision,
        "timers": {"throughput": {"enabled": False}},
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": config.optimizer.moments != "fp32",
    }
    if config.speed.fp32_gradients and config.zero_stage == 2:
        # Told to scatter, it divides by the number of ranks before it casts to float32; it sends as much either way.
        settings = _overlay(settings, {"zero_optimization": {"reduce_scatter": False}})
    return _overlay(settings, _read_extra(extra)) if extra else settings


def _gradient_dtype(config: TrainConfig) -> str:
    """The dtype in which DeepSpeed accumulates gradients.

    Asked for float32 under bf16 and ZeRO-1, DeepSpeed would switch to an optimizer without the partitions that
    checkpoints consist of; the optimizer steps in sdtrain.training.steps see to it instead.
    """
    is_set_later = config.precision == "bf16" and config.zero_stage == 1
    return "fp32" if config.speed.fp32_gradients and not is_set_later else config.precision


def _require_own_gradients(config: TrainConfig, extra: Path | None) -> None:
    """Our own steps add gradients to memory of their own, in any precision; DeepSpeed's may keep them as they come."""
    if replays_graphs(config.speed) and needs_deepspeed_steps(config, extra):
        raise UserError(
            f"speed.compile_mode: {config.speed.compile_mode} replays CUDA graphs, which leave gradients in memory "
            "that the next replay overwrites, and DeepSpeed's own optimizer step may keep them there. Set zero_stage "
            "to 1 and leave --deepspeed_config out, or set compile_mode to default or max-autotune-no-cudagraphs."
        )


def needs_deepspeed_steps(config: TrainConfig, extra: Path | None) -> bool:
    """Whether only DeepSpeed's own optimizer step does all that the config, or the JSON file `extra`, asks for."""
    return config.zero_stage != 1 or any(name not in _HEEDED for name in (_read_extra(extra) if extra else ()))


def start_engine(unet: torch.nn.Module, config: TrainConfig, settings: dict[str, Any]) -> deepspeed.DeepSpeedEngine:
    """The UNet under DeepSpeed with AdamW; UserError if the configured optimizer is not installed."""
    optimizer = make_adamw([p for p in unet.parameters() if p.requires_grad], config)
    engine, *_ = deepspeed.initialize(model=unet, optimizer=optimizer, config=settings)
    return engine


def _read_extra(path: Path) -> dict[str, Any]:
    try:
        extra = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a DeepSpeed JSON file: {error}") from error
    if taken := [name for name in _OURS if name in extra]:
        raise UserError(f"{path} sets {', '.join(taken)}, which the training config decides. Remove it there.")
    return dict(extra)


def _overlay(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _overlay(merged[key], value) if both else value
    return merged
