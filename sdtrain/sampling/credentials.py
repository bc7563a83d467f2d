"""Content credentials of sampled images: C2PA manifests saying that a trained model made them, and which one."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sdtrain import __version__
from sdtrain.formats.any_model import is_run, open_model
from sdtrain.formats.checkpoint import find_checkpoint
from sdtrain.formats.model_digest import digest_model
from sdtrain.sampling.batch import Model
from sdtrain.sampling.signer import Ingredient, Signer, trial_png
from sdtrain.sampling.start_image import StartImage

TRAINED_MODEL = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's term for what a model trained on sampled content made."""
GENERATION = "sdtrain.generation"
"""Label of our own assertion: the model."""
CHUNK = b"caBX"
"""The PNG chunk that holds a manifest."""
_PROMPT, _START = "prompt", "start-image"


@dataclass(frozen=True)
class Origin:
    """How one image came about.

    Attributes:
        title: the file's name.
        prompt: None for a sheet of several images.
        start: the image that it began from.
        is_blackened: the safety checker had it replaced by a black one.
    """

    title: str
    prompt: str | None = None
    start: StartImage | None = None
    is_blackened: bool = False


@dataclass(frozen=True)
class Credentials:
    """Signs the images of one model; `model` is what `describe_model` says of it."""

    signer: Signer
    model: Mapping[str, str | int]
    with_prompt: bool = False

    @property
    def record(self) -> str:
        """What a manifest says, for the record in the image."""
        return "model, prompt" if self.with_prompt else "model"

    def sign(self, png: bytes, origin: Origin) -> bytes:
        """Returns the PNG with its manifest; UserError if it cannot be signed."""
        prompt = origin.prompt if self.with_prompt and origin.prompt else None
        return self.signer.sign(
            png,
            _manifest(origin, self.model, prompt is not None),
            {} if prompt is None else {_PROMPT: prompt.encode()},
            [_ingredient(origin.start)] if origin.start else [],
        )

    def check(self, start: StartImage | None) -> None:
        """Signs a trial image that began from `start`; UserError if that cannot be done."""
        self.sign(trial_png(), Origin("A trial image", _PROMPT, start))


def describe_model(model: Model) -> dict[str, str | int]:
    """Name and digest of a model, and of a run its step and the digests of its config and data.

    `model_sha256` is that of `sdtrain evaluate`: the same for a run, its export and its CompVis file. Reads all
    weights once; UserError if they are damaged.
    """
    stored = open_model(model.path, model.tokenizer)
    digest = digest_model(stored, model.weights, stored.frozen())
    found: dict[str, str | int] = {"model_sha256": digest.whole, "weights": model.weights}
    if not is_run(model.path):
        return {"model": model.path.resolve().name} | found
    checkpoint = find_checkpoint(model.path)
    layout = checkpoint.layout
    run: dict[str, str | int] = {"run": checkpoint.path.resolve().parents[1].name, "step": layout.step}
    return run | found | {"config_digest": layout.config_digest, "data_digest": layout.data_digest}


def is_signed(image: Image.Image) -> bool:
    """Whether an opened PNG holds a manifest."""
    return any(name == CHUNK for name, *_ in getattr(image, "private_chunks", ()))


def _manifest(origin: Origin, model: Mapping[str, str | int], has_prompt: bool) -> dict[str, Any]:
    agent = {"name": "sdtrain", "version": __version__}
    described: dict[str, Any] = dict(model)
    if origin.start:
        described["strength"] = origin.start.strength
    return {
        "claim_generator_info": [agent],
        "title": origin.title,
        "format": "image/png",
        "ingredients": [_PROMPT_INGREDIENT] if has_prompt else [],
        "assertions": [
            {"label": "c2pa.actions.v2", "data": {"actions": _actions(origin, agent, has_prompt)}},
            {"label": GENERATION, "data": described},
        ],
    }


def _actions(origin: Origin, agent: Mapping[str, str], has_prompt: bool) -> list[dict[str, Any]]:
    """C2PA wants an image that began from another one to be opened, and any other to be created."""
    made: dict[str, Any] = {"action": "c2pa.created", "digitalSourceType": TRAINED_MODEL, "softwareAgent": agent}
    if has_prompt:
        made["parameters"] = {"ingredientIds": [_PROMPT]}
    actions = [made]
    if origin.start:
        made["action"] = "c2pa.edited"
        actions.insert(0, {"action": "c2pa.opened", "parameters": {"ingredientIds": [_START]}})
    if origin.is_blackened:
        black = {"action": "c2pa.edited", "softwareAgent": agent}
        actions.append(black | {"description": "Replaced by a black image, as the safety checker flagged it."})
    return actions


_PROMPT_INGREDIENT = {
    "title": "prompt",
    "format": "text/plain",
    "relationship": "inputTo",
    "instance_id": _PROMPT,
    "data": {
        "format": "text/plain",
        "identifier": _PROMPT,
        "data_types": [{"type": "c2pa.types.generator.prompt"}],
    },
}


def _ingredient(start: StartImage) -> Ingredient:
    """The start image, with its own manifest if it has one."""
    content = start.content()
    with Image.open(io.BytesIO(content)) as image:
        kind = "image/jpeg" if image.format == "MPO" else image.get_format_mimetype() or "application/octet-stream"
    name = Path(start.path).name
    described = {"title": name, "relationship": "parentOf", "instance_id": _START, "label": _START}
    return Ingredient(described, content, kind)
