"""Training configuration: the paper's runs by name, and users' own files."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from sdtrain.config.card import CardConfig
from sdtrain.config.data import DataConfig
from sdtrain.config.resuming import (
    DecidesNetwork,
    DecidesSamples,
    Free,
    OnResume,
    Tunable,
    TunableOnRequest,
    changeable,
    defaults_of_added,
    flat,
    rules_of,
)
from sdtrain.config.sections import (
    CheckpointConfig,
    DiffusionConfig,
    EmaConfig,
    GuardConfig,
    OptimizerConfig,
    PreviewConfig,
    ScheduleConfig,
    SpeedConfig,
    TrackingConfig,
    UNetConfig,
    ValidationConfig,
)
from sdtrain.errors import UserError
from sdtrain.precision import Precision
from sdtrain.redaction import as_recorded
from sdtrain.settings import Settings, load_settings, parse_settings, shipped, shipped_or_file

CONFIGS_DIR = Path(__file__).parents[1] / "configs"


class TrainConfig(Settings):
    """All settings of a training run."""

    name: Tunable[str]
    """Output goes to runs/NAME unless --output is given."""
    description: Free[str] = ""
    init_from: Free[str | None] = None
    """Run directory or checkpoint whose weights (raw and averaged) this run starts from; null: from scratch."""
    vae: DecidesNetwork[str] = "CompVis/stable-diffusion-v1-4"
    """Autoencoder that made the latents: a diffusers folder, a hub id, or `demo`."""
    text_encoder: DecidesNetwork[str] = "openai/clip-vit-large-patch14"
    """CLIP text encoder with its tokenizer: a folder, a hub id, or `demo`."""
    unet: UNetConfig = UNetConfig()
    data: DataConfig = DataConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    ema: EmaConfig = EmaConfig()
    speed: SpeedConfig = SpeedConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    validation: ValidationConfig = ValidationConfig()
    previews: PreviewConfig = PreviewConfig()
    tracking: TrackingConfig = TrackingConfig()
    card: CardConfig = CardConfig()
    zero_stage: Free[Literal[1, 2]] = 1
    """What DeepSpeed shards: 1 optimizer state, 2 also gradients (for small cards; more communication)."""
    precision: TunableOnRequest[Precision] = "auto"
    """Weights and activations; master weights, loss and average are always fp32. auto: bf16 where the first rank's
    device computes faster in it, else fp32, and kept on resume. fp16: dynamic loss scaling, repeating steps that
    overflow."""
    global_batch_size: DecidesSamples[int] = Field(default=2048, ge=1)
    """Samples in one optimizer step, over all ranks."""
    micro_batch_size: Free[Annotated[int, Field(ge=1)] | Literal["auto"]] = 32
    """Samples in one forward pass on one rank; changes the speed, not what a step computes. auto: the largest that
    divides a rank's share of the global batch and fits: tried on GPUs before training, computed from the free memory on
    CPUs; kept on resume wherever it fits."""
    steps: Free[int] = Field(ge=1)
    caption_dropout: DecidesSamples[float] = Field(default=0.0, ge=0, le=1)
    """Share of captions replaced by the empty string, for classifier-free guidance."""
    seed: DecidesSamples[int] = 42
    """Determines the order of samples, all noise and the initial weights."""
    log_every: Free[int] = Field(default=50, ge=1)
    """Optimizer steps between log lines."""

    @field_validator("zero_stage", mode="before")
    @classmethod
    def _stage_is_supported(cls, stage: object) -> object:
        if stage == 0:
            raise ValueError("there is no stage 0 here; use 1, which shards nothing on one rank")
        if stage == 3:
            raise ValueError(
                "stage 3 is not supported: it cuts up the weights themselves and gathers them in every pass, which "
                "only costs time where all of SD v1's state fits one card; use 1 or 2"
            )
        return stage

    @model_validator(mode="after")
    def _sections_agree(self) -> TrainConfig:
        if self.schedule.min_lr > self.optimizer.lr:
            raise ValueError(f"schedule.min_lr {self.schedule.min_lr} is above optimizer.lr {self.optimizer.lr}")
        return self

    @model_validator(mode="after")
    def _auto_can_be_found(self) -> TrainConfig:
        if self.micro_batch_size == "auto" and self.speed.compile_mode in ("reduce-overhead", "max-autotune"):
            raise ValueError(
                f"micro_batch_size: auto cannot foresee the memory that the CUDA graphs of speed.compile_mode: "
                f"{self.speed.compile_mode} keep; give a number"
            )
        if self.micro_batch_size == "auto" and self.data.online_vae:
            raise ValueError("micro_batch_size: auto does not count the VAE that data.online_vae runs; give a number")
        return self

    @property
    def micro_batch(self) -> int:
        """`micro_batch_size` as a number, once "auto" is decided (`sdtrain.training.micro_batch`)."""
        if self.micro_batch_size == "auto":
            raise AssertionError("the micro-batch is not decided yet")
        return self.micro_batch_size

    @property
    def latent_size(self) -> int:
        """Height and width of the latents."""
        return self.data.resolution // 8

    def accumulation(self, world_size: int) -> int:
        """Micro-batches per rank in one optimizer step.

        UserError, with the nearest that do, if the global batch does not divide evenly.
        """
        self.require_share(world_size)
        return self.global_batch_size // (self.micro_batch * world_size)

    def require_share(self, world_size: int) -> None:
        """Refuses a global batch that so many ranks cannot share.

        Raises:
            UserError: names the nearest batches that they can.
        """
        auto = self.micro_batch_size == "auto"
        share = world_size if auto else self.micro_batch * world_size
        if self.global_batch_size % share == 0:
            return
        below = self.global_batch_size // share * share
        choices = " or ".join(str(size) for size in (below, below + share) if size)
        sizes = "" if auto else f" in micro-batches of {self.micro_batch}"
        raise UserError(
            f"global_batch_size {self.global_batch_size} cannot be shared by {world_size} ranks{sizes}. Use "
            f"global_batch_size {choices}, or {self._micro_choices(world_size)}."
        )

    def micro_batches(self, world_size: int) -> list[int]:
        """Sizes that divide a rank's share of the global batch, smallest first; none if there is no equal share.

        With aspect-ratio buckets they also divide `data.bucket_group`.
        """
        if self.global_batch_size % world_size:
            return []
        whole = math.gcd(self.global_batch_size // world_size, self.data.bucket_group)
        return [size for size in range(1, whole + 1) if whole % size == 0]

    def _micro_choices(self, world_size: int) -> str:
        if not (sizes := self.micro_batches(world_size)):
            return "another number of ranks"
        return f"micro_batch_size {min(sizes, key=lambda size: (abs(size - self.micro_batch), size))}"

    def digest(self) -> str:
        """Hex digest of all settings that distinguish runs."""
        decisive = {name: value for name, value in _flat(self) if _RULES[name] is not OnResume.FREE}
        content = {name: value for name, value in decisive.items() if name not in _ADDED or value != _ADDED[name]}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


_RULES, _ADDED = rules_of(TrainConfig), defaults_of_added(TrainConfig)
MAY_CHANGE = changeable(_RULES)
"""Settings, and whole sections, that a resumed run may change."""


def known_configs() -> list[str]:
    """Names of the configurations shipped with sdtrain."""
    return shipped(CONFIGS_DIR)


def load_config(name_or_file: str) -> TrainConfig:
    """Loads a configuration by name or from a YAML file.

    UserError for an unknown name (with the nearest known one), an unknown key or a bad value.
    """
    return load_settings(TrainConfig, shipped_or_file(name_or_file, CONFIGS_DIR, "training config"))


class Change(Settings):
    """A changed setting."""

    name: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.name}: {self.before} -> {self.after}"

    @property
    def reason(self) -> str:
        """Why a resumed run may not make this change."""
        rule = _RULES[self.name]
        return f"{self.name} decides {rule.value}" if rule.is_fixed else f"the config does not name {self.name}"


def changes(old: TrainConfig, new: TrainConfig) -> list[Change]:
    """All settings in which two configs differ."""
    before = dict(_flat(old))
    return [Change(name=name, before=before[name], after=after) for name, after in _flat(new) if before[name] != after]


def undone(config: TrainConfig, made: Sequence[Change]) -> TrainConfig:
    """The config as it was before some changes, oldest first; UserError if a setting of theirs is gone."""
    content: dict[str, Any] = config.model_dump(mode="json")
    for change in reversed(made):
        *sections, name = change.name.split(".")
        section = content
        for part in sections:
            section = section[part]
        section[name] = change.before
    return parse_settings(TrainConfig, content, "the config of an earlier step")


def differences(old: TrainConfig, new: TrainConfig) -> list[Change]:
    """The changes that a resumed run may not make."""
    named = new.model_fields_set
    return [
        change
        for change in changes(old, new)
        if _RULES[change.name].is_fixed or (_RULES[change.name] is OnResume.ON_REQUEST and change.name not in named)
    ]


def _flat(config: TrainConfig) -> Iterator[tuple[str, Any]]:
    # Without secrets, because changes are printed and kept.
    return flat(as_recorded(config.model_dump(mode="json")), _RULES)
