"""Recipes: the model card's named subsets as data, and users' own."""

from __future__ import annotations

import functools
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from filters.ask_rules import questions_of
from filters.build_options import BuildOptions
from filters.caption_config import AskConfig, CaptionConfig
from filters.rules import RuleValue, check_carried
from filters.select_config import SelectConfig, checked_rules
from sdtrain.dataset.config import DownloadConfig, EncodeConfig, PackConfig, SourceConfig
from sdtrain.errors import UserError
from sdtrain.settings import Settings, load_settings, parse_settings, shipped, shipped_or_file

RECIPES_DIR = Path(__file__).parent / "recipes"
DecideRules = Annotated[dict[str, RuleValue], BeforeValidator(partial(checked_rules, in_decide=True))]

NETWORKS = ("clip", "aesthetic", "aesthetic_v1", "safety", "watermark", "sscd")
"""The networks of `score`, by their settings' prefix."""

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class ScoreConfig(Settings):
    """The networks that score the images. Weights are a known name, a file, `random:SEED` or null to skip."""

    clip_model: str = "ViT-L-14-quickgelu"
    clip_weights: str | None = "openai"
    aesthetic_weights: str | None = "laion-aesthetic-v2-l14"
    aesthetic_v1_weights: str | None = None
    """LAION's first aesthetic predictor, on another scale: a column and a rule of its own, `min_aesthetic_v1`."""
    watermark_weights: str | None = "laion-watermark-v1"
    safety_weights: str | None = "laion-nsfw-l14"
    sscd_weights: str | None = None
    """SSCD, a network for copy detection: keeps its embeddings as a column `sscd_embedding` of float16 lists, 1 kB an
    image. Its licence (CC BY-NC 4.0) forbids commercial use."""
    clip_sha256: Digest | None = None
    """The digest that the file of these weights must have; so for each of the following."""
    aesthetic_sha256: Digest | None = None
    aesthetic_v1_sha256: Digest | None = None
    watermark_sha256: Digest | None = None
    safety_sha256: Digest | None = None
    sscd_sha256: Digest | None = None
    batch_size: int = Field(default=32, ge=1)
    """Images in one batch of the networks; 256 suits a large GPU."""
    dtype: Literal["float32", "bf16", "fp16", "auto"] = "float32"
    """Of CLIP's, SSCD's and the watermark detector's products; bf16 and fp16 move an aesthetic score by about 0.01.
    auto: bf16 where the machine that begins the dataset computes faster in it, else float32; the dataset keeps it."""
    decode: Literal["cpu", "gpu", "auto"] = "cpu"
    """The decoder and resizer: the CPU, bit for bit as CLIP's authors do, or the GPU (auto: where there is one), whose
    pixels differ slightly, and so do their digests, by which exact duplicates are found: never mix the two."""
    store_embeddings: bool = False
    """Keep CLIP's embeddings, as a column `embedding` of float16 lists: 1.5 kB an image for ViT-L/14."""
    store_miniatures: bool = False
    """Keep small planes of pixels, by which altered copies are found, as a column `miniature`: 1.7 kB an image."""

    @property
    def pins(self) -> dict[str, str]:
        """Maps networks to the required sha256 of their weights files."""
        pinned = {name: getattr(self, f"{name}_sha256") for name in NETWORKS}
        return {name: digest for name, digest in pinned.items() if digest}

    def described(self) -> dict[str, Any]:
        """The settings that determine the scores: all but the pins, which only forbid changes.

        A setting that came later counts only where it is set, so that datasets of earlier versions stay finished.
        """
        pins = {f"{name}_sha256" for name in NETWORKS}
        unset = {name for name in ("store_miniatures", "sscd_weights") if not getattr(self, name)}
        return self.model_dump(mode="json", exclude=pins | unset)

    @model_validator(mode="after")
    def _pins_are_of_files(self) -> ScoreConfig:
        for name in self.pins:
            weights = getattr(self, f"{name}_weights")
            if weights is None or weights.startswith("random"):
                raise ValueError(f"{name}_sha256 is the digest of a file, and {name}_weights is {weights or 'null'}")
        return self


DuplicatesLevel = Literal["off", "exact", "perceptual", "altered", "copied", "semantic", "all"]
_SEARCHED: dict[DuplicatesLevel, tuple[str, ...]] = {
    "off": (),
    "exact": ("exact",),
    "perceptual": ("exact", "perceptual"),
    "altered": ("exact", "perceptual", "altered"),
    "copied": ("exact", "perceptual", "copied"),
    "semantic": ("exact", "perceptual", "semantic"),  # as before there were altered copies
    "all": ("exact", "perceptual", "altered", "copied", "semantic"),
}
_LATER = {"altered": ("altered_agreement", "overlaid_agreement"), "copied": ("copy_similarity",)}
"""Levels that came later, with their settings."""


class DuplicatesConfig(Settings):
    """Definition of duplicates among the images."""

    level: DuplicatesLevel = "off"
    """exact: equal pixels or bytes. perceptual: near perceptual hashes as well. altered: perceptual if pixels agree,
    and copies that are mirrored, cropped or overlaid with a text. copied: perceptual, and near SSCD embeddings, which
    are those of edited copies. semantic: perceptual, and near CLIP embeddings. all: all of these, copied if
    score.sscd_weights are given."""
    radius: int = Field(default=4, ge=0, le=16)
    """Largest Hamming distance between 64-bit perceptual hashes of duplicates; each bit above 6 multiplies the time."""
    altered_agreement: float = Field(default=0.88, gt=0, le=1)
    """Least share of the pixels of two miniatures that agree where they match best, for a mirrored or cropped copy."""
    overlaid_agreement: float = Field(default=0.9, gt=0, le=1)
    """Least share of their cells whose darkest, or brightest, pixels agree, for a copy with a text on it."""
    copy_similarity: float = Field(default=0.75, gt=0, le=1)
    """Least cosine between the SSCD embeddings of copies. Pairs of DISC 2021 above 0.75 are copies with a precision of
    90 %, by sscd_disc_mixup (README.md of facebookresearch/sscd-copy-detection, "Using SSCD descriptors")."""
    semantic_threshold: float = Field(default=0.95, gt=0, le=1)
    """Least cosine between the CLIP embeddings of duplicates."""
    num_clusters: int | None = Field(default=None, ge=1)
    """Only embeddings of one cluster are compared; by default 1 up to 16,384 images, else their root."""
    seed: int = 42
    """Of the clusters' first centres."""

    def searched(self, has_sscd: bool = False) -> tuple[str, ...]:
        """Returns the names of the levels that `level` includes, in their order.

        `has_sscd`: SSCD's embeddings are stored, without which `all` does not include `copied`.
        """
        without = {"copied"} if self.level == "all" and not has_sscd else set()
        return tuple(name for name in _SEARCHED[self.level] if name not in without)

    def described(self, has_sscd: bool = False) -> dict[str, Any]:
        """The settings that determine the groups; those of a level that came later count only where it is searched."""
        searched = self.searched(has_sscd)
        later = {name for level, names in _LATER.items() if level not in searched for name in names}
        return self.model_dump(mode="json", exclude=later)


def _decide_by(value: Any) -> Any:
    return "image" if value == "picture" else value  # as earlier versions called it


class DecideConfig(Settings):
    """Decisions on the downloaded images."""

    decide_by: Annotated[Literal["metadata", "image"], BeforeValidator(_decide_by)] = "metadata"
    """The scores that rules use: the metadata's, or the image's own; sizes always come from the image."""
    rules: DecideRules = Field(default={})


class Recipe(Settings):
    """Everything that decides the bytes of a dataset."""

    name: str
    description: str = ""
    expected_rows: str = ""
    """The published size of the subset, shown beside ours."""
    source: SourceConfig | None = None
    """The user's own images that `sdtrain import` reads; `select.metadata` is then the dataset's list of them."""
    select: SelectConfig = SelectConfig()
    download: DownloadConfig = DownloadConfig()
    score: ScoreConfig = ScoreConfig()
    duplicates: DuplicatesConfig = DuplicatesConfig()
    caption: CaptionConfig = CaptionConfig()
    ask: AskConfig = AskConfig()
    decide: DecideConfig = DecideConfig()
    pack: PackConfig = PackConfig()
    encode: EncodeConfig = EncodeConfig()

    @model_validator(mode="before")
    @classmethod
    def _former_section(cls, content: Any) -> Any:
        """Reads `keep`, the name of `decide` in recipes and datasets of earlier versions."""
        if not isinstance(content, dict) or "keep" not in content:
            return content
        if "decide" in content:
            raise ValueError("keep is the former name of decide: give one of the two sections")
        return {"decide" if name == "keep" else name: value for name, value in content.items()}

    @model_validator(mode="after")
    def _rules_are_known(self) -> Recipe:
        try:
            check_carried(self.decide.rules, self.select.carry)
        except UserError as error:
            raise ValueError(str(error)) from error
        return self

    @property
    def asked(self) -> AskConfig:
        """`ask`, with the server of `caption` if it names none."""
        return self.ask if self.ask.endpoint else self.ask.model_copy(update={"endpoint": self.caption.endpoint})

    @property
    def questions(self) -> list[str]:
        """The questions of rules in words, each once."""
        lines = self.decide.rules.get("ask")
        return questions_of(lines) if isinstance(lines, list) else []

    @model_validator(mode="after")
    def _somebody_answers(self) -> Recipe:
        if self.questions and self.asked.endpoint is None:
            raise ValueError("decide.rules.ask asks a server about the images: name it in ask.endpoint")
        return self

    @model_validator(mode="after")
    def _packed_captions_have_a_name(self) -> Recipe:
        if self.caption.is_on and "captions" in (name.lower() for name in self.select.carry):
            raise ValueError("select.carry names 'captions', under which packed samples hold those of `caption`")
        return self

    @model_validator(mode="after")
    def _captions_are_compared(self) -> Recipe:
        if self.caption.min_caption_similarity is not None and self.score.clip_weights is None:
            raise ValueError("caption.min_caption_similarity is CLIP's, and score.clip_weights is null")
        return self

    @model_validator(mode="after")
    def _duplicates_are_searched(self) -> Recipe:
        if self.caption.from_duplicates and self.duplicates.level == "off":
            raise ValueError(
                "caption.from_duplicates takes the texts of what dedup finds, and duplicates.level is off. Set it to "
                "exact, perceptual or another level."
            )
        return self

    @model_validator(mode="after")
    def _compared_columns_are_kept(self) -> Recipe:
        level, searched = self.duplicates.level, self.duplicates.searched(self.score.sscd_weights is not None)
        if "semantic" in searched and not (self.score.store_embeddings and self.score.clip_weights):
            raise ValueError(
                f"duplicates.level: {level} compares CLIP's embeddings. Set score.store_embeddings: true and "
                "score.clip_weights, or duplicates.level to perceptual."
            )
        if "altered" in searched and not self.score.store_miniatures:
            raise ValueError(
                f"duplicates.level: {level} compares miniatures. Set score.store_miniatures: true, or "
                "duplicates.level to perceptual."
            )
        if "copied" in searched and self.score.sscd_weights is None:
            raise ValueError(
                f"duplicates.level: {level} compares SSCD's embeddings. Set score.sscd_weights, or duplicates.level to "
                "altered or perceptual."
            )
        return self


def known_recipes() -> list[str]:
    """Returns the names of the recipes shipped with sdtrain."""
    return shipped(RECIPES_DIR)


def load_recipe(name_or_file: str, options: BuildOptions | None = None) -> Recipe:
    """Loads a recipe by name or from a YAML file, with the options' overrides.

    UserError for an unknown name (with the nearest known one), an unknown key or a bad value.
    """
    recipe = load_settings(Recipe, shipped_or_file(name_or_file, RECIPES_DIR, "recipe"))
    return _override(recipe, options) if options else recipe


def _override(recipe: Recipe, options: BuildOptions) -> Recipe:
    content: dict[str, Any] = recipe.model_dump()
    for field in fields(options):
        value = getattr(options, field.name)
        for setting in (*field.metadata["sets"], *field.metadata["sets_if_given"]):
            *sections, name = setting.split(".")
            section = functools.reduce(dict.__getitem__, sections, content)
            if value is not None and (setting in field.metadata["sets"] or name in section):
                section[name] = value
    return parse_settings(Recipe, content, f"recipe '{recipe.name}' with overrides")
