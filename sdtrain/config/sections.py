"""Sections of a training configuration: the network, what it learns, and how."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from sdtrain.config.resuming import DecidesNetwork, DecidesObjective, DecidesSamples, Free, Tunable
from sdtrain.settings import Settings


class UNetConfig(Settings):
    """The noise predictor; the defaults are SD v1's 859,520,964 parameters."""

    block_out_channels: DecidesNetwork[tuple[int, ...]] = (320, 640, 1280, 1280)
    """Channels of each level; every level after the first halves height and width."""
    layers_per_block: DecidesNetwork[int] = Field(default=2, ge=1)
    """ResBlocks in each level on the way down (one more on the way up)."""
    down_block_types: DecidesNetwork[tuple[str, ...]] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    """diffusers' block names on the way down: with or without cross-attention."""
    up_block_types: DecidesNetwork[tuple[str, ...]] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    """diffusers' block names on the way up."""
    num_heads: DecidesNetwork[int] = Field(default=8, ge=1)
    """Attention heads on every level (diffusers calls this `attention_head_dim`)."""
    norm_num_groups: DecidesNetwork[int] = Field(default=32, ge=1)
    """Groups of every GroupNorm; divides every number of channels."""
    cross_attention_dim: DecidesNetwork[int] = Field(default=768, ge=1)
    """Width of the text encoder's output."""
    gradient_checkpointing: Tunable[bool] = False
    """Recompute activations in the backward pass: less memory, a third more work."""

    @model_validator(mode="after")
    def _levels_agree(self) -> UNetConfig:
        levels = len(self.block_out_channels)
        if not levels == len(self.down_block_types) == len(self.up_block_types):
            raise ValueError(
                f"block_out_channels has {levels} levels; name as many down_block_types and up_block_types"
            )
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups or channels % self.num_heads:
                raise ValueError(f"{channels} channels cannot be divided by norm_num_groups or num_heads")
        return self


class DiffusionConfig(Settings):
    """The forward process, and what the network is asked to predict; the defaults are SD v1's."""

    num_timesteps: DecidesObjective[int] = Field(default=1000, ge=2)
    """Length of the noise schedule."""
    beta_start: DecidesObjective[float] = Field(default=0.00085, gt=0, lt=1)
    """First variance of the scaled-linear schedule."""
    beta_end: DecidesObjective[float] = Field(default=0.012, gt=0, lt=1)
    """Last variance of the scaled-linear schedule."""
    prediction_type: DecidesObjective[Literal["epsilon", "v_prediction"]] = "epsilon"
    """The noise, or the velocity between noise and latent (Salimans and Ho 2022, arXiv:2202.00512)."""
    zero_terminal_snr: DecidesObjective[bool] = False
    """Rescale the schedule so that nothing of the latent is left at its end (Lin et al. 2024, arXiv:2305.08891)."""
    min_snr_gamma: DecidesObjective[float] = Field(default=0.0, ge=0)
    """Weigh timesteps by min-SNR-gamma (Hang et al. 2023, arXiv:2303.09556; there 5); 0 weighs all alike."""
    offset_noise: DecidesSamples[float] = Field(default=0.0, ge=0)
    """Strength of noise that is constant over each latent channel, which lets a model learn dark and bright images;
    0.05 to 0.1 where it is used, 0 none."""

    @model_validator(mode="after")
    def _options_go_together(self) -> DiffusionConfig:
        if self.zero_terminal_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "zero_terminal_snr leaves pure noise at the last timestep, where predicting the noise teaches nothing; "
                "set prediction_type to v_prediction"
            )
        if self.zero_terminal_snr and self.min_snr_gamma:
            raise ValueError(
                "min_snr_gamma gives the last timestep of zero_terminal_snr the weight 0, so it would never be "
                "learned; use one of the two"
            )
        return self


class OptimizerConfig(Settings):
    """AdamW, with weight decay on every parameter as in the original runs."""

    lr: Tunable[float] = Field(default=1e-4, gt=0)
    """Learning rate after the warm-up. It is not multiplied by the batch size or the number of GPUs."""
    betas: Tunable[tuple[float, float]] = (0.9, 0.999)
    """Decays of the first and second moments."""
    eps: Tunable[float] = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: Tunable[float] = Field(default=0.01, ge=0)
    """Decoupled weight decay."""
    moments: Tunable[Literal["fp32", "int8"]] = "fp32"
    """In which Adam keeps its moments. int8 (bitsandbytes) takes 2 bytes a parameter in the place of 8, and rounds."""
    max_grad_norm: Tunable[float] = Field(default=0.0, ge=0)
    """Clip the gradient's norm to this; 0 does not clip, as in the original runs."""


class ScheduleConfig(Settings):
    """Linear warm-up, then constant or falling."""

    warmup_steps: Tunable[int] = Field(default=10_000, ge=0)
    """Optimizer steps until the full learning rate."""
    decay: Tunable[Literal["constant", "cosine", "linear"]] = "constant"
    """How the rate goes on after the warm-up."""
    decay_steps: Tunable[int | None] = Field(default=None, ge=1)
    """Optimizer step at which the rate reaches `min_lr`, and stays. Cosine and linear need it; it is not taken from
    `steps`, which may be raised later without changing what was trained."""
    min_lr: Tunable[float] = Field(default=0.0, ge=0)
    """Where the rate ends."""

    @model_validator(mode="after")
    def _ends_somewhere(self) -> ScheduleConfig:
        if self.decay == "constant":
            if self.decay_steps is not None or self.min_lr:
                raise ValueError("decay_steps and min_lr have no effect on a constant rate; set decay, or remove them")
        elif self.decay_steps is None or self.decay_steps <= self.warmup_steps:
            raise ValueError(f"{self.decay} decay needs decay_steps, more than the {self.warmup_steps} of the warm-up")
        return self


class SpeedConfig(Settings):
    """Levers that change how fast a step is, and its result only by rounding. The defaults are safe everywhere."""

    compile: Free[Literal["off", "regional", "whole"]] = "off"
    """torch.compile: of each transformer and residual block by itself (compiles in a minute or two), or of the UNet
    as one graph (longer)."""
    compile_mode: Free[Literal["default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune"]] = "default"
    """torch.compile's mode; `reduce-overhead` and `max-autotune` replay CUDA graphs."""
    channels_last: Free[bool | None] = None
    """Memory layout in which convolutions need no transposing; null: on CUDA, not on CPUs, where it does not pay."""
    attention: Free[Literal["auto", "plain", "sdpa", "flash", "efficient", "cudnn"]] = "auto"
    """Attention kernel: matrix products and a softmax (`plain`), PyTorch's own choice (`sdpa`), or one of its fused
    kernels. auto: plain on CPUs, whose fused bf16 backward pass is slower, else sdpa."""
    fused_adamw: Free[bool] = True
    """One kernel for the whole optimizer step."""
    cudnn_benchmark: Free[bool] = True
    """Let cuDNN try its convolution algorithms; batches have one shape, so it does it once. Off with
    `deterministic`."""
    deterministic: Free[bool] = False
    """Take only algorithms that give the same bits every time, so that the same run on the same kind and number of
    GPUs, with the same versions of the libraries, is repeated exactly; some are slower. CPUs need no such thing."""
    fp32_gradients: Free[bool] = True
    """Add up the gradients of micro-batches and ranks in float32, as the original runs did, whatever the network's own
    precision is. False adds and sends them in that one: 4 bytes a parameter less, and half of the traffic."""
    tf32: Free[bool] = True
    """TF32 in what is left of float32 matrix products on CUDA, as in the original runs."""

    @model_validator(mode="before")
    @classmethod
    def _deterministic_turns_benchmark_off(cls, content: Any) -> Any:
        if isinstance(content, dict) and content.get("deterministic") is True:
            return {"cudnn_benchmark": False} | content
        return content

    @model_validator(mode="after")
    def _deterministic_holds(self) -> SpeedConfig:
        if not self.deterministic:
            return self
        if self.cudnn_benchmark:
            raise ValueError(
                "cudnn_benchmark takes whichever convolution was fastest this time, so deterministic cannot hold; "
                "remove one of them"
            )
        if self.attention == "cudnn":
            raise ValueError(
                "attention: cudnn has no deterministic backward pass; with deterministic, set it to auto, sdpa, flash, "
                "efficient or plain"
            )
        if self.compile_mode.startswith("max-autotune"):
            raise ValueError(
                f"compile_mode: {self.compile_mode} takes whichever kernel was fastest this time, so deterministic "
                "cannot hold; set it to default or reduce-overhead"
            )
        return self

    @model_validator(mode="after")
    def _mode_has_effect(self) -> SpeedConfig:
        if self.compile == "off" and self.compile_mode != "default":
            raise ValueError("compile_mode has no effect while compile is off; set compile to regional or whole")
        return self
