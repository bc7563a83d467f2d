"""Training configuration: the paper's runs by name, and users' own files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from sdtrain.errors import UserError
from sdtrain.settings import Settings, load_settings, nearest

CONFIGS_DIR = Path(__file__).parent / "configs"

# Settings that may change in the middle of a run without making it another run.
_FREE = ("steps", "log_every", "checkpoint", "micro_batch_size", "zero_stage", "data", "init_from", "description")


class UNetConfig(Settings):
    """The noise predictor; the defaults are SD v1's 859,520,964 parameters."""

    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    """Channels of each level; every level after the first halves height and width."""
    layers_per_block: int = Field(default=2, ge=1)
    """ResBlocks in each level on the way down (one more on the way up)."""
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    """diffusers' block names on the way down: with or without cross-attention."""
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    """diffusers' block names on the way up."""
    num_heads: int = Field(default=8, ge=1)
    """Attention heads on every level (diffusers calls this `attention_head_dim`)."""
    norm_num_groups: int = Field(default=32, ge=1)
    """Groups of every GroupNorm; divides every number of channels."""
    cross_attention_dim: int = Field(default=768, ge=1)
    """Width of the text encoder's output."""
    gradient_checkpointing: bool = False
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


class DataConfig(Settings):
    """Where the latents come from."""

    root: str = "demo-output/data"
    """Dataset directory, holding `latents/`; `--data` on the command line."""
    resolution: int = Field(default=512, ge=8, multiple_of=8)
    """Side of the pictures in pixels; latents are 8 times smaller."""
    num_prefetch: int = Field(default=4, ge=1)
    """Micro-batches that a background thread prepares ahead."""


class DiffusionConfig(Settings):
    """The forward process."""

    num_timesteps: int = Field(default=1000, ge=1)
    """Length of the noise schedule."""
    beta_start: float = Field(default=0.00085, gt=0, lt=1)
    """First variance of the scaled-linear schedule."""
    beta_end: float = Field(default=0.012, gt=0, lt=1)
    """Last variance of the scaled-linear schedule."""


class OptimizerConfig(Settings):
    """AdamW, with weight decay on every parameter as in the original runs."""

    lr: float = Field(default=1e-4, gt=0)
    """Learning rate after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decays of the first and second moments."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(default=0.0, ge=0)
    """Clip the gradient's norm to this; 0 does not clip, as in the original runs."""


class ScheduleConfig(Settings):
    """Linear warm-up, then constant."""

    warmup_steps: int = Field(default=10_000, ge=0)
    """Optimizer steps until the full learning rate."""


class EmaConfig(Settings):
    """Exponential moving average of the fp32 weights, updated once per optimizer step."""

    decay: float = Field(default=0.9999, ge=0, lt=1)
    """Largest decay. The original code updates on every micro-batch; here it is every optimizer step."""
    warmup: bool = True
    """Use min(decay, (1 + n) / (10 + n)) at update n, so that the first weights are forgotten."""


class CheckpointConfig(Settings):
    """When the training state is written, and how much of it stays."""

    every: int = Field(default=5000, ge=1)
    """Optimizer steps between checkpoints."""
    keep_last: int = Field(default=3, ge=2)
    """Newest checkpoints that stay; at least two, in case the newest is damaged."""


class TrainConfig(Settings):
    """Everything that decides a training run."""

    name: str
    """Name of the run; its output goes to runs/NAME unless --output says otherwise."""
    description: str = ""
    """One line for people."""
    init_from: str | None = None
    """Run directory or checkpoint whose weights (raw and averaged) this run starts from; null: from scratch."""
    vae: str = "CompVis/stable-diffusion-v1-4"
    """Autoencoder that made the latents: a diffusers folder, a hub id, or `demo`."""
    text_encoder: str = "openai/clip-vit-large-patch14"
    """CLIP text encoder with its tokenizer: a folder, a hub id, or `demo`."""
    unet: UNetConfig = UNetConfig()
    data: DataConfig = DataConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    ema: EmaConfig = EmaConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    zero_stage: Literal[1, 2] = 1
    """What DeepSpeed shards: 1 optimizer state, 2 gradients too (for small cards; more communication)."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Weights and activations in the network; master weights, loss and average are always fp32."""
    global_batch_size: int = Field(default=2048, ge=1)
    """Samples in one optimizer step, however many ranks share them."""
    micro_batch_size: int = Field(default=32, ge=1)
    """Samples in one forward pass on one rank."""
    steps: int = Field(ge=1)
    """Optimizer steps of the whole run."""
    caption_dropout: float = Field(default=0.0, ge=0, le=1)
    """Share of captions replaced by the empty string, for classifier-free guidance."""
    seed: int = 42
    """Decides the order of samples, all noise and the initial weights."""
    log_every: int = Field(default=50, ge=1)
    """Optimizer steps between lines of the log."""

    @property
    def latent_size(self) -> int:
        """Height and width of the latents."""
        return self.data.resolution // 8

    def accumulation(self, world_size: int) -> int:
        """Micro-batches on each rank that make one optimizer step.

        Raises:
            UserError: the global batch cannot be shared evenly, with the nearest batches that can.
        """
        share = self.micro_batch_size * world_size
        if self.global_batch_size % share == 0:
            return self.global_batch_size // share
        below = self.global_batch_size // share * share
        choices = " or ".join(str(size) for size in (below, below + share) if size)
        raise UserError(
            f"global_batch_size {self.global_batch_size} cannot be shared by {world_size} ranks in micro-batches of "
            f"{self.micro_batch_size}. Use global_batch_size {choices}, or {self._micro_choices(world_size)}."
        )

    def _micro_choices(self, world_size: int) -> str:
        if self.global_batch_size % world_size:
            return "another number of ranks"
        share = self.global_batch_size // world_size
        divisors = [d for d in range(1, share + 1) if share % d == 0]
        return f"micro_batch_size {min(divisors, key=lambda d: (abs(d - self.micro_batch_size), d))}"

    def digest(self) -> str:
        """Hex digest of all settings that make two runs different."""
        content = self.model_dump(mode="json", exclude=set(_FREE)) | {"resolution": self.data.resolution}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def known_configs() -> list[str]:
    """Names of the configurations that come with sdtrain."""
    return sorted(path.stem for path in CONFIGS_DIR.glob("*.yaml"))


def load_config(name_or_file: str) -> TrainConfig:
    """A configuration by its name or from a YAML file.

    Raises:
        UserError: unknown name (with the nearest known one), unknown key, bad value.
    """
    path = Path(name_or_file)
    if path.suffix not in (".yaml", ".yml"):
        path = CONFIGS_DIR / f"{name_or_file}.yaml"
        if not path.exists():
            raise UserError(f"There is no training config '{name_or_file}'.{nearest(name_or_file, known_configs())}")
    return load_settings(TrainConfig, path)


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """Settings in which two runs differ, as "name: old -> new"; those that may change are left out."""
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    names = [n for n in after if n.split(".")[0] not in _FREE or n == "data.resolution"]
    return [f"{name}: {before.get(name)} -> {after[name]}" for name in names if before.get(name) != after[name]]


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
