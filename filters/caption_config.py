"""Settings of the stages that ask a network about images: CAPTION, for texts, and ASK, for rules in words."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from sdtrain.dataset.config import CaptionConfig as CollectedConfig
from sdtrain.endpoint.config import EndpointConfig
from sdtrain.precision import Precision
from sdtrain.settings import Settings

_ALT = "alt"
SHORT = (
    "Describe this image in one plain sentence of at most 25 words: what is visible, how many, its colours, the "
    "setting. Do not begin with 'The image', and do not guess."
)
LONG = (
    "Describe this image in one paragraph of plain sentences: the subjects, their number, attributes and positions, "
    "the setting, colours, light, style, and any text that can be read. Do not guess what cannot be seen."
)
PROMPTS = {"short": SHORT, "long": LONG}
"""Of servers and of models that are talked with."""


def _sources(prompts: dict[str, str]) -> dict[str, str]:
    for name in prompts:
        if name == _ALT or not name.isidentifier():
            raise ValueError(f"'{name}' cannot be the name of a prompt: take a word such as short, and not {_ALT}")
    return prompts


class CaptionModelConfig(Settings):
    """A model of transformers that this machine runs: any `AutoModelForImageTextToText`, BLIP, Florence-2."""

    name: str
    """A folder, or a model on the hub with weights in safetensors; code that comes with a model is not run."""
    revision: str | None = None
    """The hub's branch, tag or commit."""
    precision: Precision = "auto"
    """auto: bf16 where the machine that begins the dataset computes faster in it, else fp32; the dataset keeps it."""
    batch_size: int = Field(default=8, ge=1)


class CaptionConfig(CollectedConfig):
    """Captions of an image besides its own alt text; none by default, and then the stage `caption` is off."""

    endpoint: EndpointConfig | None = None
    """A server that describes the images, which are sent there."""
    model: CaptionModelConfig | None = None
    """A model that this machine runs, in place of a server."""
    prompts: Annotated[dict[str, str], AfterValidator(_sources)] = Field(default={})
    """Source of a caption -> what the network is asked; by default a `short` one, which fits CLIP's 77 tokens, and a
    `long` one. Florence-2 takes its own task names, such as <CAPTION>; BLIP the caption's first words, or ""."""
    max_tokens: int = Field(default=256, ge=1)
    """Of one answer, as the network counts; what is longer is cut off and not used."""
    image_px: int = Field(default=512, ge=16)
    """Longest side of the images that are sent."""
    similarity: bool | None = None
    """Whether to measure CLIP's similarity between image and each caption, by the CLIP of `score`: by default where
    captions are generated, and of the texts of duplicates only on request, as their images must be read again."""

    @property
    def is_on(self) -> bool:
        """Whether any caption besides the alt text is asked for."""
        return self.from_duplicates or self.is_generated

    @property
    def is_generated(self) -> bool:
        """Whether a network describes the images."""
        return self.endpoint is not None or self.model is not None

    @property
    def is_measured(self) -> bool:
        """Whether the similarity of captions other than an image's own alt text is wanted."""
        return self.is_generated if self.similarity is None else self.similarity

    def described(self) -> dict[str, Any]:
        """The settings that determine the captions; a local model's files are in the fingerprint besides."""
        asked = {"endpoint", "model", "prompts", "max_tokens", "image_px"}
        config = {name: value for name, value in super().described().items() if name not in asked}
        if self.is_generated:
            config["prompts"] = list((self.prompts or PROMPTS).items())
        return config | self.described_network()

    def described_network(self) -> dict[str, Any]:
        """Those of them that determine an answer besides its prompt."""
        config: dict[str, Any] = {"max_tokens": self.max_tokens} if self.is_generated else {}
        if self.endpoint:
            config |= {"endpoint": self.endpoint.described(), "image_px": self.image_px}
        if self.model:
            config["model"] = self.model.model_dump(mode="json", include={"precision", "batch_size"})
        return config

    @model_validator(mode="after")
    def _is_compared(self) -> CaptionConfig:
        if self.min_caption_similarity is not None and self.is_on and not self.is_measured:
            raise ValueError("caption.min_caption_similarity needs caption.similarity: true")
        return self

    @model_validator(mode="after")
    def _has_one_network(self) -> CaptionConfig:
        if self.endpoint and self.model:
            raise ValueError("caption.endpoint and caption.model are two ways to describe the images: give one")
        if self.prompts and not self.is_generated:
            raise ValueError("caption.prompts are asked nobody: give caption.endpoint or caption.model")
        return self


class AskConfig(Settings):
    """Who answers the questions of `decide.rules.ask`."""

    endpoint: EndpointConfig | None = None
    """A server that is asked about the images, which are sent there; by default that of `caption`."""
    image_px: int = Field(default=512, ge=16)
    """Longest side of the images that are sent."""
