"""Applies the safety checker of the published SD v1 to sampled images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor

from sdtrain.errors import UserError
from sdtrain.formats.fitting import fit
from sdtrain.formats.hub import find_part_folder
from sdtrain.formats.names import checker_name
from sdtrain.formats.part_files import open_part
from sdtrain.sampling.batch import Job

SafetyCheck = Callable[[Sequence[Image.Image]], Sequence[bool]]
"""Returns whether each image is flagged."""
Flagged = Literal["black", "refuse"]


@dataclass(frozen=True)
class CheckedImage:
    """An image, black or None if it is flagged."""

    job: Job
    image: Image.Image | None
    flagged: bool = False


def check_images(
    drawn: Iterable[tuple[Job, Image.Image]], check: SafetyCheck | None, flagged: Flagged = "black"
) -> Iterator[CheckedImage]:
    """Checks images one at a time, so that verdicts do not depend on the batch; without `check`, passes all."""
    for job, image in drawn:
        if check is None or not check([image])[0]:
            yield CheckedImage(job, image)
        else:
            yield CheckedImage(job, Image.new("RGB", image.size) if flagged == "black" else None, True)


def load_safety_checker(name: str, device: str = "cpu") -> SafetyCheck:
    """Loads diffusers' StableDiffusionSafetyChecker (analysed by Rando et al. 2022, arXiv:2210.04610).

    `name` is its folder, a pipeline's folder that holds one, or a hub id. UserError if it is none of these.
    """
    # Not at the top: it imports all of diffusers' pipelines, which would slow down sampling without a check.
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    folder = find_part_folder(name, "safety_checker")
    try:
        config = CLIPConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            empty = StableDiffusionSafetyChecker(config)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{folder} is not a safety checker of Stable Diffusion v1: {error}") from error
    is_nested = any(key.startswith("vision_model.vision_model.") for key in empty.state_dict())
    try:
        tensors = dict(fit(open_part(folder, "safety_checker"), empty, checker_name(is_nested), str(folder)))
    except UserError as error:
        raise UserError(f"{folder} is not a safety checker of Stable Diffusion v1: {error}") from error
    network = StableDiffusionSafetyChecker.from_pretrained(None, config=config, state_dict=tensors, dtype=torch.float32)
    return _SafetyChecker(network.to(device).eval(), _processor(name, config))


def _processor(name: str, config: CLIPConfig) -> CLIPImageProcessor:
    folder = find_part_folder(name, "safety_checker")
    for place in (folder, folder.parent / "feature_extractor"):
        if (place / "preprocessor_config.json").is_file():
            return CLIPImageProcessor.from_pretrained(place, local_files_only=True)
    side_px = config.vision_config.image_size
    return CLIPImageProcessor(size={"shortest_edge": side_px}, crop_size={"height": side_px, "width": side_px})


class _SafetyChecker:
    def __init__(self, network: Any, processor: CLIPImageProcessor):
        self._network, self._processor = network, processor

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> Sequence[bool]:
        pixels = self._processor(list(images), return_tensors="pt").pixel_values.to(self._network.device)
        # The network blackens `images`; only the flags are needed here.
        _, flags = self._network(clip_input=pixels, images=[torch.zeros(1) for _ in images])
        return [bool(flag) for flag in flags]
