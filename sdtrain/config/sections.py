"""Sections of a training configuration: network, objective, optimizer, speed, monitoring, checkpoints and guards."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from sdtrain.config.resuming import DecidesNetwork, DecidesObjective, DecidesSamples, Free, Tunable
from sdtrain.settings import Settings


class UNetConfig(Settings):
    """The noise predictor; the defaults are SD v1's 859,520,964 parameters."""

    block_out_channels: DecidesNetwork[tuple[int, ...]] = (320, 640, 1280, 1280)
    """Channels of each level; every level after the first halves height and width."""
    layers_per_block: DecidesNetwork[int] = Field(default=2, ge=1)
    """ResBlocks on each level of the down path (the up path has one more)."""
    down_block_types: DecidesNetwork[tuple[str, ...]] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    """diffusers' block names, with or without cross-attention."""
    up_block_types: DecidesNetwork[tuple[str, ...]] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    num_heads: DecidesNetwork[int] = Field(default=8, ge=1)
    """On every level (diffusers calls this `attention_head_dim`)."""
    norm_num_groups: DecidesNetwork[int] = Field(default=32, ge=1)
    """Must divide every number of channels."""
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
    """The forward process and the prediction target; the defaults are SD v1's."""

    num_timesteps: DecidesObjective[int] = Field(default=1000, ge=2)
    beta_start: DecidesObjective[float] = Field(default=0.00085, gt=0, lt=1)
    """First variance of the scaled-linear schedule."""
    beta_end: DecidesObjective[float] = Field(default=0.012, gt=0, lt=1)
    """Last variance of the scaled-linear schedule."""
    prediction_type: DecidesObjective[Literal["epsilon", "v_prediction"]] = "epsilon"
    """The noise, or the velocity between noise and latent (Salimans and Ho 2022, arXiv:2202.00512)."""
    zero_terminal_snr: DecidesObjective[bool] = False
    """Rescale the schedule so that nothing of the latent is left at its end (Lin et al. 2024, arXiv:2305.08891)."""
    min_snr_gamma: DecidesObjective[float] = Field(default=0.0, ge=0)
    """Weigh timesteps by min-SNR-gamma (Hang et al. 2023, arXiv:2303.09556, who use 5); 0 weighs all equally."""
    offset_noise: DecidesSamples[float] = Field(default=0.0, ge=0)
    """Strength of noise that is constant over each latent channel, to learn dark and bright images; usually 0.05 to
    0.1."""

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
    """Learning rate after the warm-up; not scaled by batch size or number of GPUs."""
    betas: Tunable[tuple[float, float]] = (0.9, 0.999)
    eps: Tunable[float] = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: Tunable[float] = Field(default=0.01, ge=0)
    moments: Tunable[Literal["fp32", "int8"]] = "fp32"
    """Precision of Adam's moments. int8 (bitsandbytes) takes 2 bytes per parameter instead of 8, and rounds."""
    max_grad_norm: Tunable[float] = Field(default=0.0, ge=0)
    """Clips the gradient's norm; 0 does not, as in the original runs."""


class ScheduleConfig(Settings):
    """Linear warm-up, then constant or falling."""

    warmup_steps: Tunable[int] = Field(default=10_000, ge=0)
    decay: Tunable[Literal["constant", "cosine", "linear"]] = "constant"
    """Shape of the schedule after the warm-up."""
    decay_steps: Tunable[int | None] = Field(default=None, ge=1)
    """Optimizer step at which the rate reaches `min_lr` and stays; needed by cosine and linear. Not derived from
    `steps`, which may be raised later without changing the earlier training."""
    min_lr: Tunable[float] = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _ends_somewhere(self) -> ScheduleConfig:
        if self.decay == "constant":
            if self.decay_steps is not None or self.min_lr:
                raise ValueError("decay_steps and min_lr have no effect on a constant rate; set decay, or remove them")
        elif self.decay_steps is None or self.decay_steps <= self.warmup_steps:
            raise ValueError(f"{self.decay} decay needs decay_steps, more than the {self.warmup_steps} of the warm-up")
        return self


LONGEST_AVERAGE = 0.28
"""Just below 1 / sqrt(12), the length of the plain mean of all weights."""
AverageLength = Annotated[float, Field(ge=0.001, le=LONGEST_AVERAGE)]
"""Standard deviation of an average's profile over the updates, relative to their number."""


class EmaConfig(Settings):
    """Exponential moving average of the fp32 weights, updated once per optimizer step."""

    decay: Tunable[float] = Field(default=0.9999, ge=0, lt=1)
    """Largest decay, per optimizer step; the original code updates on every micro-batch."""
    warmup: Tunable[bool] = True
    """Use min(decay, (1 + n) / (10 + n)) at update n, so that the first weights are forgotten."""
    post_hoc: Free[tuple[AverageLength, ...]] = ()
    """Lengths of more averages, such as [0.05, 0.1], of which a snapshot is kept beside each checkpoint for ever: from
    them `sdtrain export --ema-length` makes an average of any length (EDM2: Karras et al. 2024, arXiv:2312.02696). Each
    takes 4 bytes a parameter, shared by the ranks. They begin with the run."""
    snapshots: Free[Literal["fp16", "fp32"]] = "fp16"
    """Precision of those snapshots on disk."""

    @field_validator("post_hoc")
    @classmethod
    def _lengths_differ(cls, lengths: tuple[float, ...]) -> tuple[float, ...]:
        if len({f"{length:g}" for length in lengths}) < len(lengths):
            raise ValueError("post_hoc names a length twice")
        return lengths


class SpeedConfig(Settings):
    """Settings that change a step's speed, and its result only by rounding; the defaults are safe everywhere."""

    compile: Free[Literal["off", "fused", "regional", "whole"]] = "off"
    """torch.compile: only GroupNorm with its SiLU, and GEGLU, each fused (`fused`, the quickest to compile); each
    transformer and residual block (`regional`, a minute or two); or the UNet as one graph (`whole`, longer). Off, norms
    on CUDA leave channels_last, which costs two transposes each. Not measured on a GPU yet."""
    compile_mode: Free[Literal["default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune"]] = "default"
    """`reduce-overhead` and `max-autotune` replay CUDA graphs."""
    channels_last: Free[bool | None] = None
    """Memory layout that spares convolutions a transpose, of their weights too; files keep the usual one. null: on CUDA
    only, because it does not pay on CPUs."""
    attention: Free[Literal["auto", "plain", "sdpa", "flash", "efficient", "cudnn"]] = "auto"
    """Matrix products and a softmax (`plain`), PyTorch's own choice (`sdpa`), or one of its fused kernels. auto: plain
    on CPUs, whose fused bf16 backward pass is slower, else sdpa."""
    fused_adamw: Free[bool] = True
    """One kernel for the whole optimizer step."""
    cudnn_benchmark: Free[bool] = True
    """Let cuDNN try its convolution algorithms, once, as batches have one shape. Off with `deterministic`."""
    deterministic: Free[bool] = False
    """Use only bit-reproducible algorithms, some of them slower: a run repeats exactly on the same kind and number of
    GPUs with the same library versions. CPUs do not need it."""
    fp32_gradients: Free[bool] = True
    """Accumulate and reduce gradients in float32, as the original runs did. False uses the network's precision: 2 bytes
    per parameter less under ZeRO-1, and half of the traffic."""
    tf32: Free[bool] = True
    """TF32 for the remaining float32 matrix products on CUDA, as in the original runs."""

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
        if self.compile == "fused" and self.compile_mode in ("reduce-overhead", "max-autotune"):
            raise ValueError(
                f"compile_mode: {self.compile_mode} replays CUDA graphs, which copy their inputs: too much for such "
                "small parts as of compile: fused. Set compile to regional or whole, or compile_mode to default"
            )
        return self


class ValidationConfig(Settings):
    """The loss on samples that training never sees, at fixed timesteps with fixed noise."""

    num_samples: DecidesSamples[int] = Field(default=0, ge=0)
    """Number of the dataset's last samples held out; 0: no validation, as in the original runs."""
    every: Free[int] = Field(default=1000, ge=1)
    """Optimizer steps between validations."""
    num_timesteps: Free[int] = Field(default=8, ge=1)
    """Timesteps for every sample, in the middle of equal parts of the noise schedule."""


class PreviewConfig(Settings):
    """Images of fixed prompts and seeds, sampled from the averaged weights during training."""

    every: Free[int] = Field(default=0, ge=0)
    """Optimizer steps between sheets; 0: none."""
    prompts: Free[tuple[str, ...]] = ()
    """One image per prompt; image i has seed i."""
    guidance_scale: Free[float] = Field(default=7.5, ge=0)
    """1 is no guidance."""
    num_steps: Free[int] = Field(default=50, ge=1)
    """PLMS steps."""

    @model_validator(mode="after")
    def _has_prompts(self) -> PreviewConfig:
        if self.every and not self.prompts:
            raise ValueError("previews need prompts; name some, or set every to 0")
        return self


class TrackingConfig(Settings):
    """Where metrics go in addition to log.csv and TensorBoard's event files."""

    wandb_project: Free[str | None] = None
    """Project at Weights & Biases (`WANDB_MODE=offline` keeps the run on disk); null: not used."""


class CheckpointConfig(Settings):
    """Interval and retention of checkpoints."""

    every: Free[int] = Field(default=5000, ge=1)
    """Optimizer steps between checkpoints."""
    keep_last: Free[int] = Field(default=3, ge=2)
    """Newest checkpoints kept; at least two, in case the newest is damaged."""
    keep_every: Free[int] = Field(default=0, ge=0)
    """Checkpoints at multiples of this many steps are kept for ever; a multiple of `every`. 0: none."""
    mode: Free[Literal["async", "sync"]] = "async"
    """async: training waits only for a copy to host memory (16 bytes per parameter, shared by the ranks), which a
    thread then writes. sync: training waits for the disk."""

    @model_validator(mode="after")
    def _permanent_ones_are_made(self) -> CheckpointConfig:
        if self.keep_every % self.every:
            raise ValueError(
                f"keep_every {self.keep_every} is no multiple of every {self.every}, so there would be no checkpoint "
                "to keep at most of its steps; set it to a multiple"
            )
        return self


class GuardConfig(Settings):
    """Reaction to a step that would ruin the run, or that hangs."""

    on_nonfinite: Free[Literal["stop", "skip"]] = "stop"
    """At a NaN or infinite gradient: stop, or leave the weights unchanged and go on. `skip` reads the gradient's norm
    from the device in every optimizer step. fp16 first repeats the step with smaller loss scales."""
    max_grad_norm_ratio: Free[float] = Field(default=0.0, ge=0)
    """A gradient norm above this many times the median of the last `norm_window` is a spike; 0: none is, as in the
    original runs. Above 0 the norm is read from the device in every optimizer step."""
    on_spike: Free[Literal["stop", "skip"]] = "skip"
    norm_window: Free[int] = Field(default=100, ge=2)
    """Applied steps in the median of norms; before that many there are no spikes."""
    max_skips_in_a_row: Free[int] = Field(default=10, ge=1)
    """Training stops after this many."""
    stall_timeout_s: Free[float] = Field(default=600, ge=0)
    """Seconds without progress after which a rank names those that are behind and ends the job; 0: never."""
    compile_timeout_s: Free[float] = Field(default=3600, ge=0)
    """The same where `speed.compile` may be at work: in the first pass with each shape of batch, the first validation
    and the first previews. Taken if larger than `stall_timeout_s`."""

    @property
    def reads_every_norm(self) -> bool:
        """Whether the gradient's norm is read from the device in every step."""
        return self.on_nonfinite == "skip" or self.max_grad_norm_ratio > 0
