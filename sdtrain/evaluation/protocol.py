"""The settings that decide every number of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from sdtrain.options import Resize, SamplerName, Weights
from sdtrain.precision import Precision
from sdtrain.settings import Settings, nearest

# Stable_Diffusion_v1_Model_Card.md in CompVis/stable-diffusion, "Evaluation Results".
CARD_SCALES = (1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)

STAND_INS = tuple(sorted(path.parent.name for path in Path(__file__).parents[1].glob("*/evaluation.py")))
"""Packages of sdtrain that bring networks of their own for trials, in a module `evaluation`."""
NETWORKS = (*STAND_INS, "inception", "dinov2")
"""In the order of their columns. The first one's features lie with CLIP's, so a new network goes last."""
AGREEMENTS = ("clip", *STAND_INS, "none")


class Protocol(Settings):
    """How images are drawn and what they are compared with; defaults are the model card's where it has any."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    prompts: str
    """One prompt a line, a table with a column `prompt` (.csv, .tsv, .jsonl, .parquet), or COCO's captions (.json)."""
    num_prompts: int = Field(default=10_000, ge=2)
    """Prompts, and so images for each scale; a seeded choice."""
    prompt_seed: int = Field(default=0, ge=0)
    """Seed of the choice of prompts."""
    reference: str
    """Real images: a dataset of sdtrain's (s3://… too), a folder of images, WebDataset tars, or an .npz (mu, sigma)."""
    num_reference: int = Field(default=50_000, ge=2)
    """Most real images, a seeded choice; an .npz is used whole."""
    reference_view: Literal["as_samples", "as_is"] = "as_samples"
    """Real images resized (bicubic) and centre-cropped to the samples' size first, or as they are."""
    scales: tuple[float, ...] = Field(default=CARD_SCALES, min_length=1)
    """Guidance scales; 1 is no guidance."""
    num_steps: int = Field(default=50, ge=1)
    """Sampling steps."""
    sampler: SamplerName = "plms"
    """The sampler."""
    seed: int = Field(default=0, ge=0)
    """Seed of the first image; each next one has the next, the same for all scales and models."""
    weights: Weights = "ema"
    """Averaged weights, or raw ones."""
    dtype: Precision = "auto"
    """Of UNet and text encoder. auto: as the evaluation began, or bf16 where it is faster here, else fp32."""
    vae_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the VAE that decodes. auto: as the evaluation began, or bf16 if the UNet is on a GPU in bf16, else fp32."""
    tokenizer: str | None = None
    """For a CompVis file, which holds none: a folder, a hub id or `demo`; by default CLIP's."""
    batch_size: int = Field(default=16, ge=1)
    """Images drawn at once; another number gives images that differ in their last bits."""
    part_size: int = Field(default=256, ge=2)
    """Images in a part, which is drawn and kept as a whole."""
    networks: tuple[str, ...] = Field(default=("inception",), min_length=1)
    """Networks whose features FID and the like compare, with commas: inception, dinov2; a stand-in's mean nothing."""
    network_weights: str = "inception-fid"
    """Inception's weights: `inception-fid` (fetched once), or a file."""
    dinov2_weights: str = "dinov2-vitl14"
    """DINOv2's weights: `dinov2-vitl14` (fetched once), or a file (dinov2_vitl14_pretrain.pth)."""
    resize: Resize = "pytorch-fid"
    """How images come to Inception's 299 pixels."""
    agreement: str = Field(default="clip", json_schema_extra={"enum": list(AGREEMENTS)})
    """What compares images with their prompts: CLIP, a stand-in's checker, or nothing."""
    clip_model: str = "ViT-L-14-quickgelu"
    """An open_clip model."""
    clip_weights: str = "openai"
    """Its weights: open_clip's tag, or a file."""
    cmmd: bool = False
    """Also compare CLIP's embeddings of real and drawn images."""
    preference: str | None = None
    """Also predict people's preference, by a CLIP in transformers' format: yuvalkirstain/PickScore_v1, or a folder."""

    @model_validator(mode="before")
    @classmethod
    def _former_network(cls, content: Any) -> Any:
        """Reads `network`, as protocols called it when there was one."""
        if isinstance(content, dict) and "network" in content:
            content = dict(content)
            content.setdefault("networks", content.pop("network"))
        return content

    @field_validator("networks", mode="before")
    @classmethod
    def _names(cls, given: Any) -> Any:
        return tuple(name.strip() for name in given.split(",")) if isinstance(given, str) else given

    @field_validator("networks")
    @classmethod
    def _in_order(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        """Each once, in one order, so that the first one's features stay when another network is added."""
        return tuple(sorted({_known(name, NETWORKS) for name in names}, key=NETWORKS.index))

    @field_validator("agreement")
    @classmethod
    def _is_known(cls, name: str) -> str:
        return _known(name, AGREEMENTS)

    @field_validator("scales")
    @classmethod
    def _each_scale_once(cls, scales: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(scales)) != len(scales) or min(scales) < 0:
            raise ValueError("name each guidance scale once, none below 0")
        return tuple(sorted(scales))

    @model_validator(mode="after")
    def _cmmd_needs_clip(self) -> Protocol:
        if self.cmmd and self.agreement != "clip":
            raise ValueError("cmmd compares CLIP's embeddings, so set agreement to clip")
        return self

    @property
    def parts(self) -> list[int]:
        """The parts of each scale, by number."""
        return list(range(-(-self.num_prompts // self.part_size)))

    def indices(self, part: int) -> range:
        """The images of a part, by number."""
        return range(part * self.part_size, min((part + 1) * self.part_size, self.num_prompts))


def _known(name: str, known: Sequence[str]) -> str:
    if name not in known:
        raise ValueError(f"there is no '{name}'.{nearest(name, list(known))}")
    return name
