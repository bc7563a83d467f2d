"""Stage `networks`: the UNet's prediction and gradient next to those of plain float32 on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdtrain.config import load_config
from sdtrain.config.sections import SpeedConfig
from sdtrain.models.backends import attention_kernels, compile_unet, set_backends
from sdtrain.models.layout import channels_last_names, usual_layout
from sdtrain.models.unet import memory_format, prepare_for
from tests.benchmarks.random_unet import build_random_unet
from tests.benchmarks.training_loops import CUDA, DEVICE
from tests.gpu_check.child import Check

LIMITS = {"fp32": 1e-4, "bf16": 2e-2}
"""Largest relative error of the prediction. On a CPU, SD v1 at 16x16 latents in bf16 is off by 0.014."""
GRADIENT_FACTOR = 10
"""A gradient has gone through the network twice: there, those of single weights are off by up to 0.055."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
NUM_SAMPLES, NUM_TOKENS = 2, 77
_COMPILING_S = 40


@dataclass(frozen=True)
class Variant:
    """One way to run the network."""

    precision: str
    attention: str
    channels_last: bool
    compile: Literal["off", "fused"] = "off"

    @property
    def name(self) -> str:
        compiled = "" if self.compile == "off" else f" {self.compile}"
        return f"{self.precision} {self.attention} {'channels_last' if self.channels_last else 'contiguous'}{compiled}"

    @property
    def speed(self) -> SpeedConfig:
        """Its settings; TF32 and the choice of convolutions by speed would hide what is compared."""
        return SpeedConfig(
            attention=self.attention,
            channels_last=self.channels_last,
            compile=self.compile,
            cudnn_benchmark=False,
            tf32=False,
        )


def variants() -> Iterator[Variant]:
    """Those that this device can have: no fused kernel of CUDA's does float32 but the memory-efficient one."""
    kernels = {
        "fp32": ("plain", "sdpa", "efficient") if CUDA else ("plain", "sdpa", "flash"),
        "bf16": ("plain", "sdpa", "flash", "efficient", "cudnn") if CUDA else ("plain", "sdpa", "flash"),
    }
    for precision, names in kernels.items():
        for name in names:
            yield from (Variant(precision, name, channels_last) for channels_last in (False, True))
    if CUDA:  # a CPU compiles it for minutes
        yield Variant("bf16", "sdpa", True, compile="fused")


def compare(check: Check) -> None:
    config = load_config("tiny" if check.is_small else "sd-v1-3")
    torch.manual_seed(0)
    unet = build_random_unet(config.unet, config.latent_size)
    inputs = _inputs(config)
    set_backends(SpeedConfig(tf32=False, cudnn_benchmark=False))
    reference = _run(copy.deepcopy(unet).to("cpu"), Variant("fp32", "plain", False), inputs, torch.device("cpu"))
    reference = {name: values.to(DEVICE) for name, values in reference.items()}
    check.record(kernels={name: _head_sizes(backend, config) for name, backend in _BACKENDS.items()})
    for variant in variants():
        if variant.compile != "off" and check.seconds_left() < _COMPILING_S:
            check.record(**{variant.name: f"skipped: {check.seconds_left():.0f} s were left"})
            continue
        try:
            found = _run(copy.deepcopy(unet), variant, inputs, DEVICE)
        except RuntimeError as error:
            check.record(**{variant.name: f"{type(error).__name__}: {str(error)[:300]}"})
            check.expect(False, f"{variant.name} does not run")
            continue
        errors = {name: _relative_error(values, reference[name]) for name, values in found.items()}
        check.record(**{variant.name: {name: float(f"{error:.3g}") for name, error in errors.items()}})
        limit = LIMITS[variant.precision]
        check.expect(errors["prediction"] < limit, f"{variant.name}: prediction off by {errors['prediction']:.2g}")
        is_near = errors["gradient"] < GRADIENT_FACTOR * limit
        check.expect(is_near, f"{variant.name}: gradient off by {errors['gradient']:.2g}")


def _head_sizes(backend: SDPBackend, config: Any) -> dict[str, str]:
    """Whether a kernel, forward and backward, takes heads of the UNet's sizes; where not, another stands in for it."""
    found = {}
    for size in sorted({channels // config.unet.num_heads for channels in config.unet.block_out_channels}):
        query = torch.randn(2, 8, 256, size, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        try:
            with sdpa_kernel([backend]):
                F.scaled_dot_product_attention(query, query, query).sum().backward()
            found[str(size)] = "yes"
        except RuntimeError as error:
            found[str(size)] = f"no: {str(error)[:80]}"
    return found


def _inputs(config: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    side, width = config.latent_size, config.unet.cross_attention_dim
    return {
        "noisy": torch.randn(NUM_SAMPLES, 4, side, side, generator=generator),
        "target": torch.randn(NUM_SAMPLES, 4, side, side, generator=generator),
        "context": torch.randn(NUM_SAMPLES, NUM_TOKENS, width, generator=generator),
    }


def _run(unet: Any, variant: Variant, inputs: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Prediction, and gradient of its mean squared error by all parameters, as flat float32 vectors."""
    dtype = _DTYPES[variant.precision]
    unet = torch.nn.Module.to(prepare_for(unet, device, variant.speed, for_training=True), dtype)
    compile_unet(unet, variant.speed)
    layout = memory_format(device, variant.speed)
    noisy = inputs["noisy"].to(device, dtype).to(memory_format=layout)
    timesteps = torch.tensor([100, 900], device=device)
    with attention_kernels(variant.speed):
        predicted = unet(noisy, timesteps, inputs["context"].to(device, dtype)).sample.float()
        F.mse_loss(predicted, inputs["target"].to(device)).backward()
    return {"prediction": predicted.detach().reshape(-1), "gradient": _gradient(unet)}


def _gradient(unet: Any) -> torch.Tensor:
    permuted = channels_last_names(unet)
    gradients = {name: parameter.grad.float() for name, parameter in unet.named_parameters()}
    return torch.cat([(usual_layout(g) if name in permuted else g).reshape(-1) for name, g in gradients.items()])


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
